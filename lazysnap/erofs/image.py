# SPDX-License-Identifier: Apache-2.0
"""From an index to an EROFS image of the layer's tree, without the bytes of its files.

The image is a lower layer of an overlay whose data-only lower layers hold the bytes, in files that
`redirect` names:

    mount -t erofs -o ro IMAGE DIR                       (a file as source: Linux 6.12)
    mount -t overlay -o metacopy=on,lowerdir=DIR1:DIR2::OBJECTS overlay TARGET

Without `metacopy=on` the kernel follows marks from the lowest of several images only (since Linux 6.16):
it refuses to look for them in further lower layers, whether or not there is anything to be found.

Every regular file that is not empty has a size, a hole in place of data, and overlay's marks that send
readers to the data.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from binascii import hexlify
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from lazysnap.erofs import directories, xattrs
from lazysnap.erofs.layout import (
    BLOCK,
    CHUNK_BASED,
    CHUNK_FORMAT,
    CHUNK_SIZE,
    DIRECTORY_TYPE,
    FILE_TYPES,
    FLAT_INLINE,
    FLAT_PLAIN,
    I_U,
    I_U_AT,
    INODE,
    INODE_FIELDS,
    INODE_SIZE,
    MAX_FILE_SIZE,
    NULL_CHUNK,
    SECOND,
    SLOT,
    XATTR_HEADER,
    encode_device,
    owner_and_time,
    superblock,
    xattr_count,
)
from lazysnap.erofs.trailer import make_trailer
from lazysnap.errors import FormatError, InvalidArgument
from lazysnap.index.model import IMPLIED, NO_KEY, OPAQUE
from lazysnap.index.reader import LayerIndex

# The sizes of an index's files add up to less than 2**63 bytes, so this is only for damaged ones.
_MAX_FURTHER_CHUNKS = (1 << 63) // CHUNK_SIZE

_FORMAT = 0o170000  # S_IFMT
_REGULAR = stat.S_IFREG >> 12

# Nearly all inodes are files without further attributes whose digest is known, and written in one go:
# the inode, all up to the redirect's first slash, its two digits and second slash, and the name with
# the chunk table. Two pairs of 16-bit fields, of which one is constant, are taken together.
_FILE = struct.Struct(f"<II{INODE_FIELDS[5:]}53s2ss64s4s4x")
_REDIRECT = b"/" * 68
_OBJECT_MARKS = xattrs.encode_one(xattrs.METACOPY, b"") + xattrs.encode_one(
    xattrs.REDIRECT, _REDIRECT
)
_OBJECT_FORMAT = CHUNK_BASED | xattr_count(len(XATTR_HEADER + _OBJECT_MARKS)) << 16
_OBJECT_BEGIN = XATTR_HEADER + _OBJECT_MARKS[: 1 - len(_REDIRECT)]


class Inherited(Protocol):
    """The attributes of a directory that the layer leaves out, from the layers below it."""

    @property
    def node(self) -> int:
        """The directory, in the index."""

    @property
    def mode(self) -> int:
        """Permissions."""

    @property
    def uid(self) -> int:
        """Owner."""

    @property
    def gid(self) -> int:
        """Group."""

    @property
    def mtime_ns(self) -> int:
        """Time of modification, in nanoseconds since 1970."""

    @property
    def xattrs(self) -> Sequence[tuple[bytes, bytes]]:
        """Names and values of its extended attributes."""


def build(
    index: LayerIndex,
    *,
    opaque_xattr: bytes = b"trusted.overlay.opaque",
    inherited: Iterable[Inherited] = (),
) -> bytearray:
    """The image of a layer's tree, with a trailer for `read_trailer`.

    The same arguments always give the same bytes.

    Args:
        index: of the layer.
        opaque_xattr: name of the xattr that marks opaque directories; empty to leave them unmarked.
        inherited: attributes of directories, to take the place of those in the index. Those without
            extended attributes can as well be written over a finished image, see `overwrite`.

    Returns:
        The image: about 200 bytes for each file, and 30 more for each of its names.

    Raises:
        FormatError: the index is damaged; reason `xattr-not-storable` or `file-too-large` if the
            layer has what EROFS cannot hold.
        InvalidArgument: `inherited` tells of something that is no directory of this layer, or of
            impossible owners.
    """
    builder = _Builder(index, opaque_xattr, {entry.node: entry for entry in inherited})
    try:
        builder.place()
        builder.fill()
    except (struct.error, IndexError, OverflowError) as error:
        raise _damaged(str(error)) from error
    return builder.finish()


class _Directory(NamedTuple):
    """A directory whose names are still to be written."""

    node: int
    names: list[bytes]
    nodes: list[int]  # that they lead to
    block: int  # its first one, among those of data
    tail_at: int  # where its last block stands behind the inode; 0: among the others


class _Builder:
    """Places the inodes one behind the other, and then fills in the directories."""

    def __init__(
        self, index: LayerIndex, opaque_xattr: bytes, inherited: Mapping[int, Inherited]
    ) -> None:
        self.index = index
        self.opaque_xattr = opaque_xattr
        self.inherited = inherited
        self.out = bytearray(BLOCK)
        self.nids = array("I")
        self.types = bytearray()
        self.blocks = 0  # of data that does not stand behind inodes
        self.extents: list[tuple[int, int]] = []  # inodes that have such blocks, and the first one
        self.targets: list[tuple[int, bytes]] = []  # of symbolic links that do
        self.directories: list[_Directory] = []
        self.places: list[tuple[int, int]] = []  # inodes of the trailer
        self.encoded: dict[int, bytes] = {0: b""}  # xattrs by their place in the index
        self.further_chunks = 0
        self.dirents = 0

    def place(self) -> None:
        """Write all inodes, and leave room for names."""
        out, add_nid, add_type = self.out, self.nids.append, self.types.append
        keys_of, pack = self.index.content_keys, _FILE.pack
        for node, row in enumerate(self.index.rows()):
            mode, uid, gid, nlink, _, size, mtime_ns, _, first, count, xattr, keys, _ = row
            add_type(FILE_TYPES.get(mode & _FORMAT, 0))
            if xattr or not 0 < size <= CHUNK_SIZE or mode >> 12 != _REGULAR:
                self._any(node, row)
                continue
            object_key, _ = keys_of(first, count, keys)
            if object_key == NO_KEY:
                self._file(node, row)
                continue
            add_nid(len(out) // SLOT)
            name = hexlify(object_key)
            seconds, nanoseconds = divmod(mtime_ns, SECOND)
            out += pack(
                _OBJECT_FORMAT,
                mode,
                size,
                CHUNK_FORMAT,
                node + 1,
                uid,
                gid,
                seconds,
                nanoseconds,
                nlink,
                _OBJECT_BEGIN,
                name[:2],
                b"/",
                name,
                NULL_CHUNK,
            )

    def _any(self, node: int, row: tuple[int, ...]) -> None:
        """Write an inode of any kind."""
        mode, rdev, size, xattr = row[0], row[4], row[5], row[10]
        kind = mode & _FORMAT
        if kind == stat.S_IFDIR:
            self._directory(node, row)
        elif kind == stat.S_IFREG and size:
            self._file(node, row)
        elif kind == stat.S_IFLNK:
            self._symlink(node, row)
        elif kind in FILE_TYPES:
            device = encode_device(os.major(rdev), os.minor(rdev))
            area = xattrs.area(self._xattrs(node, xattr))
            self._append(node, row, FLAT_PLAIN, 0, area, i_u=device)
        else:
            raise _damaged(f"a file of mode {mode:o}")

    def _file(self, node: int, row: tuple[int, ...]) -> None:
        size, first, count, xattr, keys = row[5], *row[8:12]
        chunks = -(-size // CHUNK_SIZE)
        self.further_chunks += chunks - 1
        if size > MAX_FILE_SIZE or self.further_chunks > _MAX_FURTHER_CHUNKS:
            raise FormatError(f"EROFS cannot hold a file of {size} bytes", reason="file-too-large")
        marks = xattrs.data_marks(*self.index.content_keys(first, count, keys))
        area = xattrs.area(marks + self._xattrs(node, xattr))
        self._append(node, row, CHUNK_BASED, size, area, tail=NULL_CHUNK * chunks, i_u=CHUNK_FORMAT)

    def _symlink(self, node: int, row: tuple[int, ...]) -> None:
        target = self.index.readlink(node)
        if row[10]:
            xattrs.check_symlink(self.index.xattrs(node))
        area = xattrs.area(self._xattrs(node, row[10]))
        if INODE_SIZE + len(area) + len(target) <= BLOCK:
            self._append(node, row, FLAT_INLINE, len(target), area, tail=target)
        else:
            at = self._append(node, row, FLAT_PLAIN, len(target), area)
            self.targets.append((self._allocate(at, -(-len(target) // BLOCK)), target))

    def _directory(self, node: int, row: tuple[int, ...]) -> None:
        first, count = row[8:10]
        self.dirents += count
        if self.dirents > self.index.dirent_count:
            raise _damaged("directories share names")
        names, nodes = self.index.listing(first, count)
        directories.check_names(names)
        full, tail = directories.measure(names)
        area, row = self._inherit(node, row)
        inline = INODE_SIZE + len(area) + tail <= BLOCK
        at = self._append(
            node,
            row,
            FLAT_INLINE if inline else FLAT_PLAIN,
            full * BLOCK + tail,
            area,
            tail=bytes(tail) if inline else b"",
        )
        blocks = full if inline else full + 1
        block = self._allocate(at, blocks) if blocks else 0
        tail_at = at + INODE_SIZE + len(area) if inline else 0
        self.directories.append(_Directory(node, names, nodes, block, tail_at))
        if node == 0 or row[7] & IMPLIED:
            self.places.append((node, at))

    def _inherit(self, node: int, row: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
        """The extended attributes of a directory, and its row, as lower layers have them."""
        heir = self.inherited.get(node)
        own = self.opaque_xattr if row[7] & OPAQUE else b""
        if heir is None:
            entries = self._xattrs(node, row[10])
        else:
            owner_and_time(heir.uid, heir.gid, heir.mtime_ns)  # refuses what cannot be
            mode = stat.S_IFDIR | stat.S_IMODE(heir.mode)
            row = (mode, heir.uid, heir.gid, *row[3:6], heir.mtime_ns, *row[7:])
            entries = xattrs.encode(pair for pair in heir.xattrs if pair[0] != own)
        if own:
            entries = xattrs.encode_one(own, b"y") + entries
        return xattrs.area(entries), row

    def _xattrs(self, node: int, place: int) -> bytes:
        """A node's extended attributes without header; many nodes have the same ones."""
        found = self.encoded.get(place)
        if found is None:
            found = self.encoded[place] = xattrs.encode(self.index.xattrs(node))
        return found

    def _append(
        self,
        node: int,
        row: tuple[int, ...],
        layout: int,
        size: int,
        area: bytes,
        *,
        tail: bytes = b"",
        i_u: int = 0,
    ) -> int:
        """Write an inode and what stands behind it; returns its offset."""
        out = self.out
        length = INODE_SIZE + len(area) + len(tail)
        if layout == FLAT_INLINE and len(out) % BLOCK + length > BLOCK:
            # the kernel does not look for the tail in any further block
            out += bytes(-len(out) % BLOCK)
        at = len(out)
        self.nids.append(at // SLOT)
        mode, uid, gid, nlink, mtime_ns = *row[:4], row[6]
        seconds, nanoseconds = divmod(mtime_ns, SECOND)
        out += INODE.pack(
            layout,
            xattr_count(len(area)),
            mode,
            0,
            size,
            i_u,
            node + 1,
            uid,
            gid,
            seconds,
            nanoseconds,
            nlink,
        )
        out += area
        out += tail
        out += bytes(-len(out) % SLOT)
        return at

    def _allocate(self, inode_at: int, blocks: int) -> int:
        """Take blocks for an inode's data; returns the first one's number among those of data."""
        block = self.blocks
        self.extents.append((inode_at, block))
        self.blocks += blocks
        return block

    def fill(self) -> None:
        """Write names and long targets, now that all inodes have their places."""
        out = self.out
        out += bytes(-len(out) % BLOCK)
        base = len(out) // BLOCK
        out += bytes(self.blocks * BLOCK)
        for at, block in self.extents:
            I_U.pack_into(out, at + I_U_AT, base + block)
        for block, target in self.targets:
            start = (base + block) * BLOCK
            out[start : start + len(target)] = target
        parents = {0: 0}
        for directory in self.directories:
            self._fill_directory(directory, base, parents)

    def _fill_directory(self, directory: _Directory, base: int, parents: dict[int, int]) -> None:
        nids, types = self.nids, self.types
        node, names, nodes = directory.node, directory.names, directory.nodes
        for child in nodes:
            if types[child] == DIRECTORY_TYPE:
                # the index numbers nodes breadth first, and a directory has one name only
                if child <= node or child in parents:
                    raise _damaged("directories go round in a circle")
                parents[child] = node
        if node not in parents:
            raise _damaged("a directory without a name")
        directories.add_dots(names, nodes, node, parents.pop(node))
        bounds = [0, *directories.split(names)]
        start = (base + directory.block) * BLOCK
        for low, high in pairwise(bounds):
            if high == len(names) and directory.tail_at:
                start = directory.tail_at
            part = nodes[low:high]
            block = directories.block(
                names[low:high], map(nids.__getitem__, part), map(types.__getitem__, part)
            )
            self.out[start : start + len(block)] = block
            start += BLOCK

    def finish(self) -> bytearray:
        """The superblock and the trailer, and so the image."""
        out = self.out
        strange = self.inherited.keys() - {directory.node for directory in self.directories}
        if strange:
            raise InvalidArgument(f"node {min(strange)} of the layer is not a directory")
        out[:BLOCK] = superblock(
            nodes=self.index.node_count,
            blocks=len(out) // BLOCK,
            uuid=self.index.toc_digest.raw[:16],
        )
        out += make_trailer(self.places, len(out))
        return out


def _damaged(what: str) -> FormatError:
    return FormatError(f"layer index is damaged: {what}", reason="bad-index")
