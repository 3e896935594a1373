# SPDX-License-Identifier: Apache-2.0
"""Which inodes of a finished image may get other attributes, and how.

A layer does not know the attributes of its root and of the directories that it leaves out: they are
those of the layers below. So behind the last block of an image stands where these inodes are, for
whoever makes a copy of the image for a place in a stack:

    for each of them, sorted: node in the index, inode's place in units of 32 bytes
    magic, how many there are, CRC32 of the list, length of all before the trailer

The kernel does not look there.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterable

from isal import isal_zlib

from lazysnap.erofs.layout import (
    MODE,
    MODE_AT,
    OWNER_AND_TIME_AT,
    ROOT_AT,
    SLOT,
    owner_and_time,
)
from lazysnap.errors import FormatError

MAGIC = b"lzsnerof"

_PLACE = struct.Struct("<II")
_FOOTER = struct.Struct("<8sIIQ")


def make_trailer(places: Iterable[tuple[int, int]], length: int) -> bytes:
    """The trailer of an image.

    Args:
        places: nodes and the offsets of their inodes in bytes, sorted.
        length: of the image, in bytes.
    """
    table = b"".join([_PLACE.pack(node, offset // SLOT) for node, offset in places])
    footer = _FOOTER.pack(MAGIC, len(table) // _PLACE.size, isal_zlib.crc32(table), length)
    return table + footer


def read_trailer(image: bytes | mmap.mmap) -> dict[int, int]:
    """Where the inodes are that may be overwritten: of the root and of left-out directories.

    Args:
        image: a whole image, as `build` made it.

    Returns:
        Offset of the inode in bytes, by its node in the index.

    Raises:
        FormatError: not such an image, or not all of it.
    """
    end = len(image) - _FOOTER.size
    if end >= 0:
        magic, count, checksum, length = _FOOTER.unpack_from(image, end)
        if magic == MAGIC and length + count * _PLACE.size == end:
            table = image[length:end]
            places = {node: slot * SLOT for node, slot in _PLACE.iter_unpack(table)}
            inside = all(ROOT_AT <= place < length for place in places.values())
            if isal_zlib.crc32(table) == checksum and inside:
                return places
    raise FormatError("not a complete image of a layer's tree", reason="bad-image")


def overwrite(
    offset: int, *, mode: int, uid: int, gid: int, mtime_ns: int
) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """What to write over an inode to give a directory other attributes.

    Args:
        offset: of the inode, from `read_trailer`.
        mode: permissions.
        uid: owner.
        gid: group.
        mtime_ns: time of modification, in nanoseconds since 1970.

    Returns:
        Offsets in the image, and the bytes to write there.

    Raises:
        InvalidArgument: there are no such users or times.
    """
    return (
        (offset + MODE_AT, MODE.pack(stat.S_IFDIR | stat.S_IMODE(mode))),
        (offset + OWNER_AND_TIME_AT, owner_and_time(uid, gid, mtime_ns)),
    )
