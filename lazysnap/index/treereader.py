# SPDX-License-Identifier: Apache-2.0
"""Reads the tree in an index in place: nodes, names, attributes; and the head of an index.

See `lazysnap.index.reader`, which adds the contents of files.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from isal import isal_zlib

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, InvalidArgument
from lazysnap.index import layout
from lazysnap.index.layout import (
    ATTRIBUTES,
    DIRENT,
    DIRENT_SIZE,
    NODE,
    NODE_SIZE,
    NUMBER,
    PLACE,
    PLACE_AT,
    XATTR,
    XATTR_COUNT,
)
from lazysnap.index.model import Attributes

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BATCH = 4096  # nodes that `rows` reads at once


class TreeIndex:
    """The index of one layer, without the contents of its files.

    Args:
        buffer: all of its bytes. `bytes` and `mmap` are used in place, so the map must stay open as
            long as the index is used; anything else is copied.

    Attributes:
        kind: format of the layer, as in `TocLocation`.
        compression: of its members, as in `TocLocation`.
        verified: whether the table of contents was checked against a digest.
        blob_size: bytes of the compressed layer.
        toc_offset: blob offset of the compressed table of contents.
        data_end: blob offset where the members end.
        prefetch_end: blob offset up to which the layer asks to be fetched first; 0: it asks for
            nothing to be fetched; None: it does not say.
        total_size: sum of the sizes of its regular files, in bytes.
        toc_digest: sha256 of the uncompressed table of contents.
        recorded_root: attributes that the layer lists for its root, if it does. An unpack ignores
            them, so `attributes(0)` are those of an unpacked layer: mode 0755, owner 0:0.
        node_count, dirent_count, chunk_count, member_count: how many there are.

    Raises:
        FormatError: not an index of this version, or damaged.
    """

    def __init__(self, buffer: Buffer) -> None:
        raw = buffer if isinstance(buffer, bytes | mmap.mmap) else bytes(buffer)
        self._raw: bytes | mmap.mmap = raw
        try:
            self._open(raw)
        except (struct.error, IndexError, ValueError) as error:
            raise FormatError(f"layer index is damaged: {error}", reason="bad-index") from error

    def _open(self, raw: bytes | mmap.mmap) -> None:
        magic, version, checksum, length = layout.PREAMBLE.unpack_from(raw)
        if magic != layout.MAGIC or version != layout.VERSION:
            raise FormatError("not a layer index of this version", reason="bad-index")
        if length != len(raw):
            raise ValueError(f"{len(raw)} of {length} bytes")
        with memoryview(raw) as view, view[layout.CHECKED_FROM :] as checked:
            if isal_zlib.crc32(checked) != checksum:
                raise ValueError("wrong checksum")
        facts = layout.FACTS.unpack_from(raw, layout.PREAMBLE.size)
        self.kind = layout.KINDS[facts[0]]
        self.compression = layout.COMPRESSIONS[facts[1]]
        self.verified = bool(facts[2])
        _, self.blob_size, self.toc_offset, self.data_end, prefetch_end = facts[3:8]
        self.prefetch_end: int | None = prefetch_end if prefetch_end >= 0 else None
        self.total_size: int = facts[8]
        self.toc_digest = Digest.from_sha256(facts[9])
        mode, uid, gid, _, mtime_ns = facts[10:15]
        self.recorded_root = (
            Attributes(
                mode=mode, uid=uid, gid=gid, nlink=2, rdev=0, size=0, mtime_ns=mtime_ns, flags=0
            )
            if mode
            else None
        )
        self._sections(raw)

    def _sections(self, raw: bytes | mmap.mmap) -> None:
        offsets: list[int] = []
        counts: list[int] = []
        table = layout.PREAMBLE.size + layout.FACTS.size
        for section, size in layout.RECORD_SIZES.items():
            offset, length = layout.SECTION.unpack_from(raw, table + section * layout.SECTION.size)
            if length % size or offset + length > len(raw):
                raise ValueError(f"section {section} is out of place")
            offsets.append(offset)
            counts.append(length // size)
        (
            self._nodes,
            self._dirents,
            self._implied,
            self._keys,
            self._chunks,
            self._members,
            self._member_chunks,
            self._xattrs,
            self._text,
            self._named,
        ) = offsets
        (
            self.node_count,
            self.dirent_count,
            self._implied_count,
            self._key_count,
            self.chunk_count,
            self.member_count,
            self._member_chunk_count,
            self._xattrs_length,
            self._text_length,
            self._named_count,
        ) = counts
        if self.node_count == 0:
            raise ValueError("no root")

    def give_back(self) -> None:
        """Take no memory for what was read: it stays in the page cache, and is mapped again if need be."""
        if isinstance(self._raw, mmap.mmap):
            self._raw.madvise(mmap.MADV_DONTNEED)

    # Nodes.

    def attributes(self, node: int) -> Attributes:
        """The attributes of a node."""
        self._check(node, self.node_count, "node")
        return Attributes._make(ATTRIBUTES.unpack_from(self._raw, self._nodes + node * NODE_SIZE))

    def _place(self, node: int) -> tuple[int, int, int, int, int]:
        self._check(node, self.node_count, "node")
        at = self._nodes + node * NODE_SIZE + PLACE_AT
        return PLACE.unpack_from(self._raw, at)

    def _mode(self, node: int) -> int:
        self._check(node, self.node_count, "node")
        mode: int = NUMBER.unpack_from(self._raw, self._nodes + node * NODE_SIZE)[0]
        return mode

    def _check(self, number: int, count: int, what: str) -> None:
        if not 0 <= number < count:
            raise InvalidArgument(f"the layer has no {what} {number}, only {count}")

    def readlink(self, node: int) -> bytes:
        """The target of a symbolic link.

        Raises:
            InvalidArgument: it is none.
        """
        if not stat.S_ISLNK(self._mode(node)):
            raise InvalidArgument(f"node {node} is not a symbolic link")
        offset, length, *_ = self._place(node)
        return self._slice(offset, length)

    def xattrs(self, node: int) -> tuple[tuple[bytes, bytes], ...]:
        """Names and values of a node's extended attributes, sorted by name.

        Without the one that makes a directory opaque: its name depends on the overlay mount, so
        it is for the server to add when the flag `OPAQUE` is set.
        """
        at = self._place(node)[2]
        if not at:
            return ()
        raw, end = self._raw, self._xattrs + self._xattrs_length
        at += self._xattrs - 1
        found: list[tuple[bytes, bytes]] = []
        try:
            (count,) = XATTR_COUNT.unpack_from(raw, at)
            at += XATTR_COUNT.size
            for _ in range(count):
                name, value = XATTR.unpack_from(raw, at)
                at += XATTR.size
                found.append((raw[at : at + name], raw[at + name : at + name + value]))
                at += name + value
        except struct.error as error:
            raise damaged("extended attributes") from error
        if at > end:
            raise damaged("extended attributes")
        return tuple(found)

    @property
    def has_xattrs(self) -> bool:
        """Whether any node has extended attributes (the marks of opaque directories apart)."""
        return self._xattrs_length > 0

    def implied(self) -> Iterator[tuple[int, bytes]]:
        """Directories that the layer does not list, with their paths; parents come first."""
        for number in range(self._implied_count):
            (node,) = NUMBER.unpack_from(self._raw, self._implied + number * NUMBER.size)
            yield node, self.path(node)

    # Names.

    def _entries(self, node: int) -> tuple[int, int]:
        """First dirent and number of dirents of a directory; (0, 0) for other nodes."""
        if not stat.S_ISDIR(self._mode(node)):
            return 0, 0
        first, count, *_ = self._place(node)
        if first + count > self.dirent_count:
            raise damaged("directory")
        return first, count

    def _dirent(self, number: int) -> tuple[bytes, int, int]:
        """Name, node and directory."""
        at = self._dirents + number * DIRENT_SIZE
        offset, length, node, parent = DIRENT.unpack_from(self._raw, at)
        return self._slice(offset, length), node, parent

    def _slice(self, offset: int, length: int) -> bytes:
        if offset + length > self._text_length:
            raise damaged("name")
        start = self._text + offset
        return self._raw[start : start + length]

    def lookup(self, parent: int, name: bytes) -> int:
        """The node called `name` in the directory `parent`, or -1."""
        low, count = self._entries(parent)
        high = low + count
        raw, dirents, text = self._raw, self._dirents, self._text
        unpack = DIRENT.unpack_from
        while low < high:
            middle = (low + high) // 2
            offset, length, node, _ = unpack(raw, dirents + middle * DIRENT_SIZE)
            offset += text
            found = raw[offset : offset + length]
            if found == name:
                return int(node)
            if found < name:
                low = middle + 1
            else:
                high = middle
        return -1

    def child_count(self, node: int) -> int:
        """How many names a directory holds; 0 for other nodes."""
        return self._entries(node)[1]

    def children(self, node: int, start: int = 0) -> Iterator[tuple[int, bytes, int]]:
        """The names in a directory, sorted by their bytes.

        Args:
            node: the directory.
            start: position to go on from; 0 for the first name.

        Yields:
            position, name, node. Go on after this one with `position + 1`.
        """
        first, count = self._entries(node)
        for position in range(max(start, 0), count):
            name, child, _ = self._dirent(first + position)
            yield position, name, child

    def _first_name(self, node: int) -> tuple[bytes, int]:
        """The first name of a node other than the root, and the directory that it is in."""
        number = self._place(node)[4]
        if number >= self.dirent_count:
            raise damaged("name")
        name, _, parent = self._dirent(number)
        return name, parent

    def name(self, node: int) -> bytes:
        """A name of a node, or the first of them; empty for the root."""
        return self._first_name(node)[0] if node else b""

    def parent(self, node: int) -> int:
        """The directory that a node is in, or the first of them; the root is its own parent."""
        return self._first_name(node)[1] if node else 0

    def path(self, node: int) -> bytes:
        """A path of a node from the root, `/` for the root itself.

        Raises:
            FormatError: the index is damaged.
        """
        parts: list[bytes] = []
        for _ in range(4096):  # the longest path has fewer components
            if node == 0:
                return b"/" + b"/".join(reversed(parts))
            name, node = self._first_name(node)
            parts.append(name)
        raise damaged("path")

    # All of a tree, for those who copy it.

    def rows(self) -> Iterator[tuple[int, ...]]:
        """The record of each node, see `layout.NODE`, in the order of their numbers."""
        raw, step = self._raw, _BATCH * NODE_SIZE
        end = self._nodes + self.node_count * NODE_SIZE
        for at in range(self._nodes, end, step):
            yield from NODE.iter_unpack(raw[at : min(at + step, end)])

    def listing(self, first: int, count: int) -> tuple[list[bytes], list[int]]:
        """Names in a directory, and their nodes.

        Args:
            first: its first dirent, as its row tells.
            count: how many dirents it has.
        """
        if first + count > self.dirent_count:
            raise damaged("directory")
        raw, text = self._raw, self._text
        at = self._dirents + first * DIRENT_SIZE
        found = [
            (raw[text + offset : text + offset + length], node)
            for offset, length, node, _ in DIRENT.iter_unpack(raw[at : at + count * DIRENT_SIZE])
        ]
        return [name for name, _ in found], [node for _, node in found]


def damaged(what: str) -> FormatError:
    """The error for a number that cannot be right."""
    return FormatError(f"layer index is damaged: {what} out of range", reason="bad-index")
