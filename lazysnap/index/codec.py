# SPDX-License-Identifier: Apache-2.0
"""Writes an index: a layer's tree and chunks as the flat records of `layout`.

The same layer always gives the same bytes. Nodes are numbered breadth first with names sorted, so a
directory's entries are neighbours. `LayerIndex` reads what is written here.
"""

from __future__ import annotations

import stat
from itertools import chain, pairwise

from isal import isal_zlib

from lazysnap.errors import FormatError
from lazysnap.index import layout
from lazysnap.index.build import Layer
from lazysnap.index.content import Content, Piece
from lazysnap.index.layout import (
    CHUNK,
    DIRENT,
    KEYS,
    MEMBER,
    NAME_PREFIX,
    NAMED,
    NODE,
    NUMBER,
    SECTION,
    XATTR,
    XATTR_COUNT,
)
from lazysnap.index.model import IMPLIED, NO_KEY
from lazysnap.index.tree import Node


def encode(layer: Layer) -> bytes:
    """The index of a layer, as it is stored.

    Raises:
        FormatError: chunks overlap, or the layer is too large to be indexed.
    """
    writer = _Writer(layer)
    writer.number()
    writer.write_nodes()
    writer.write_names()
    writer.write_chunks()
    return writer.assemble()


class _Writer:
    """Fills the sections."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.sections = [bytearray() for _ in range(layout.SECTION_COUNT)]
        self.nodes: list[Node] = []
        self.places: list[tuple[int, int]] = []  # first dirent and count of each node
        self.names: list[int] = []  # the first dirent of each node
        self.pieces: list[Piece] = []
        self.owners: list[int] = []
        self.xattrs: dict[bytes, int] = {}
        self.named: dict[bytes, int] = {}  # the first node of each content
        self.total_size = 0

    def number(self) -> None:
        """Number the nodes, count their links, and write the dirents."""
        nodes, names = self.nodes, self.names
        text = self.sections[layout.TEXT]
        dirents = self.sections[layout.DIRENTS]
        root = self.layer.root
        root.number, root.nlink = 0, 2
        nodes.append(root)
        names.append(layout.NO_DIRENT)
        count = 0
        for number, node in enumerate(nodes):  # grows on the way
            children = node.children
            if children is None:
                self.places.append((0, 0))
                continue
            self.places.append((count, len(children)))
            for name, child in sorted(children.items()):
                if child.number < 0:
                    child.number = len(nodes)
                    nodes.append(child)
                    names.append(count)
                    if child.children is not None:
                        child.nlink = 1
                        node.nlink += 1
                child.nlink += 1
                dirents += DIRENT.pack(len(text), len(name), child.number, number)
                text += name
                count += 1

    def write_nodes(self) -> None:
        """Write the nodes and what hangs on them; collect the chunks."""
        table = self.sections[layout.NODES]
        text = self.sections[layout.TEXT]
        implied = self.sections[layout.IMPLIED_NODES]
        for number, (node, place, name) in enumerate(
            zip(self.nodes, self.places, self.names, strict=True)
        ):
            first, count = place
            keys = 0
            content = node.content
            if content is not None:
                first, count = len(self.pieces), len(content.pieces)
                self.pieces += content.pieces
                self.owners += [number] * count
                keys = self._keys(content, number)
                self.total_size += content.size
            elif stat.S_ISLNK(node.mode):
                target = node.link.encode()
                first, count = len(text), len(target)
                text += target
            if node.flags & IMPLIED:
                implied += NUMBER.pack(number)
            table += NODE.pack(
                node.mode,
                node.uid,
                node.gid,
                node.nlink,
                node.rdev,
                node.size,
                node.mtime_ns,
                node.flags,
                first,
                count,
                self._xattrs(node) if node.xattrs else 0,
                keys,
                name,
            )
        if self.total_size >= 1 << 63 or len(text) >= 1 << 32:
            raise FormatError("the layer is too large to be indexed")

    def _keys(self, content: Content, number: int) -> int:
        """1 + the number of the content's keys; 0 if its chunk's digest is its key."""
        if len(content.pieces) == 1 and (digest := content.pieces[0].digest):
            self.named.setdefault(digest, number)
            return 0
        table = self.sections[layout.CONTENT_KEYS]
        object_key, partial_key = content.keys(self.layer.toc.digest.raw)
        table += KEYS.pack(object_key, partial_key)
        self.named.setdefault(partial_key if object_key == NO_KEY else object_key, number)
        return len(table) // KEYS.size

    def write_names(self) -> None:
        """Write the table by which a content is found by its name."""
        names = sorted(self.named)
        prefixes = chain.from_iterable(map(NAME_PREFIX.unpack_from, names))
        self.sections[layout.BY_NAME] += b"".join(
            map(NAMED.pack, prefixes, map(self.named.__getitem__, names))
        )

    def _xattrs(self, node: Node) -> int:
        """1 + the offset of the node's extended attributes."""
        assert node.xattrs is not None
        if len(node.xattrs) >= 1 << 16:
            raise FormatError(f"a file has {len(node.xattrs)} extended attributes")
        parts = [XATTR_COUNT.pack(len(node.xattrs))]
        for name, value in sorted(node.xattrs.items()):
            parts += [XATTR.pack(len(name), len(value)), name, value]
        data = b"".join(parts)
        heap = self.sections[layout.XATTRS]
        at = self.xattrs.get(data)
        if at is None:
            at = self.xattrs[data] = len(heap) + 1
            heap += data
            if len(heap) >= 1 << 32:
                raise FormatError("the layer's extended attributes are too large to be indexed")
        return at

    def write_chunks(self) -> None:
        """Write chunks and members."""
        members = self.layer.contents.members(self.pieces)
        counts = [end - first for first, end in pairwise([*members.firsts, len(members.chunks)])]
        self.sections[layout.MEMBERS] += b"".join(
            map(MEMBER.pack, members.blob_offsets, members.blob_ends, members.firsts, counts)
        )
        self.sections[layout.MEMBER_CHUNKS] += b"".join(map(NUMBER.pack, members.chunks))
        table = self.sections[layout.CHUNKS]
        for owner, member, piece in zip(self.owners, members.numbers, self.pieces, strict=True):
            table += CHUNK.pack(
                owner,
                member,
                piece.file_offset,
                piece.size,
                piece.inner_offset,
                bool(piece.digest),
                piece.digest or NO_KEY,
            )

    def assemble(self) -> bytes:
        """Everything behind the header, and the header."""
        toc = self.layer.toc
        location = toc.location
        root = self.layer.recorded_root or Node(0)
        prefetch_end = self.layer.prefetch_end
        facts = layout.FACTS.pack(
            layout.KINDS.index(location.kind),
            layout.COMPRESSIONS.index(location.compression),
            toc.verified,
            0,
            location.blob_size,
            location.offset,
            location.data_end,
            -1 if prefetch_end is None else prefetch_end,
            self.total_size,
            toc.digest.raw,
            root.mode,
            root.uid,
            root.gid,
            0,
            root.mtime_ns,
        )
        table = [facts]
        sections: list[bytes | bytearray] = []
        at = layout.PREAMBLE.size + len(facts) + layout.SECTION_COUNT * SECTION.size
        sections.append(bytes(-at % 8))
        at += -at % 8
        for section in self.sections:
            table.append(SECTION.pack(at, len(section)))
            section += bytes(-len(section) % 8)
            sections.append(section)
            at += len(section)
        checksum = isal_zlib.crc32(layout.U64.pack(at))
        for part in (*table, *sections):
            checksum = isal_zlib.crc32(part, checksum)
        preamble = layout.PREAMBLE.pack(layout.MAGIC, layout.VERSION, checksum, at)
        return b"".join((preamble, *table, *sections))
