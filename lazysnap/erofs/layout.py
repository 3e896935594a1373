# SPDX-License-Identifier: Apache-2.0
"""The bytes of an EROFS file system, as far as they are written here.

Source: Linux fs/erofs/erofs_fs.h (format), fs/erofs/{super,inode,namei,xattr,data}.c (what the kernel
makes of it) and Documentation/filesystems/erofs.rst. Everything is little-endian.

An image is blocks of 4 KiB:

    block 0     the superblock, and nothing else: its checksum covers the whole block, so that
                attributes can be overwritten later without a new checksum
    inodes      from block 1, the root first; each at a multiple of 32 bytes, followed by its extended
                attributes, and then by its chunk table, or its last data block if it is small enough
    data        blocks of directories and symbolic links that do not fit behind their inodes
    trailer     of lazysnap, see `trailer`; no part of the file system
"""

from __future__ import annotations

import stat
import struct

from lazysnap.errors import InvalidArgument

BLOCK = 4096
BLOCK_BITS = 12
SUPERBLOCK_AT = 1024
SECOND = 10**9  # times in an index are in nanoseconds

# A node's number is its inode's place in these units.
SLOT = 32
ROOT_AT = BLOCK  # the superblock holds only 16 bits of the root's number, so it comes first

# struct erofs_super_block: magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos,
# build_time, build_time_nsec, blocks, meta_blkaddr, xattr_blkaddr, uuid, volume_name,
# feature_incompat, and 44 bytes that matter to compressed files and further devices only
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
MAGIC = 0xE0F5E1E2
COMPAT_SB_CHKSUM = 0x1
COMPAT_MTIME = 0x2  # times are modification times
INCOMPAT_CHUNKED_FILE = 0x4  # since Linux 5.15
CHECKSUM_AT = SUPERBLOCK_AT + 4

# struct erofs_inode_extended: i_format, i_xattr_icount, i_mode, reserved, i_size, i_u, i_ino, i_uid,
# i_gid, i_mtime, i_mtime_nsec, i_nlink, reserved
INODE_FIELDS = "<HHHHQIIIIqII16x"
INODE = struct.Struct(INODE_FIELDS)
INODE_SIZE = 64
I_U = struct.Struct("<I")  # block address, device number or chunk format
I_U_AT = 16
MODE = struct.Struct("<H")
MODE_AT = 4
_OWNER_AND_TIME = struct.Struct("<IIqI")  # i_uid, i_gid, i_mtime, i_mtime_nsec
OWNER_AND_TIME_AT = 24

# i_format: bit 0 says extended, the bits above are the data layout.
FLAT_PLAIN = 1 | 0 << 1
FLAT_INLINE = 1 | 2 << 1
CHUNK_BASED = 1 | 4 << 1

# Chunks of 2**31 blocks, the largest that the format knows; a table of 4-byte addresses.
CHUNK_FORMAT = 31
CHUNK_SIZE = BLOCK << CHUNK_FORMAT
NULL_CHUNK = b"\xff\xff\xff\xff"  # EROFS_NULL_ADDR: all zeros
MAX_FILE_SIZE = 1 << 62

# struct erofs_xattr_ibody_header (h_name_filter, h_shared_count, reserved), once for each inode that
# has extended attributes. i_xattr_icount counts the rest in units of 4 bytes, and the header as one.
XATTR_HEADER = bytes(12)
XATTR_UNIT = 4
MAX_XATTR_AREA = len(XATTR_HEADER) + XATTR_UNIT * (2**16 - 2)
# struct erofs_xattr_entry: e_name_len, e_name_index, e_value_size; name and value follow
XATTR_ENTRY = struct.Struct("<BBH")
MAX_XATTR_NAME = 255
MAX_XATTR_VALUE = 2**16 - 1

# struct erofs_dirent: nid, nameoff, file_type, reserved. A block of a directory is such records, and
# then their names without separators; the first nameoff tells how many there are. Sorted by the
# bytes of the names, through all blocks, with "." and ".." among them.
DIRENT = struct.Struct("<QHBx")
DIRENT_SIZE = 12
MAX_NAME = 255

# FT_* of Linux include/linux/fs_types.h
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}
DIRECTORY_TYPE = FILE_TYPES[stat.S_IFDIR]

assert SUPERBLOCK.size == 128
assert INODE.size == INODE_SIZE
assert DIRENT.size == DIRENT_SIZE


def xattr_count(area: int) -> int:
    """i_xattr_icount of an inode.

    Args:
        area: bytes of its extended attributes with the header; 0 if it has none.
    """
    return (area - len(XATTR_HEADER)) // XATTR_UNIT + 1 if area else 0


def owner_and_time(uid: int, gid: int, mtime_ns: int) -> bytes:
    """The fields at `OWNER_AND_TIME_AT` of an inode.

    Args:
        uid: owner.
        gid: group.
        mtime_ns: time of modification, in nanoseconds since 1970.

    Raises:
        InvalidArgument: there are no such users or times.
    """
    try:
        return _OWNER_AND_TIME.pack(uid, gid, *divmod(mtime_ns, SECOND))
    except struct.error as error:
        raise InvalidArgument(
            f"an inode cannot have the owner {uid}:{gid} and the time {mtime_ns}"
        ) from error


def encode_device(major: int, minor: int) -> int:
    """A device number as i_u holds it (new_encode_dev of Linux include/linux/kdev_t.h)."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def superblock(*, nodes: int, blocks: int, uuid: bytes) -> bytes:
    """The first block.

    Args:
        nodes: how many inodes there are.
        blocks: how many blocks.
        uuid: 16 bytes that tell this file system from others; overlayfs compares them.
    """
    fields = SUPERBLOCK.pack(
        MAGIC,
        0,
        COMPAT_SB_CHKSUM | COMPAT_MTIME,
        BLOCK_BITS,
        0,
        ROOT_AT // SLOT,
        nodes,
        0,
        0,
        blocks,
        0,
        0,
        uuid,
        b"",
        INCOMPAT_CHUNKED_FILE,
    )
    block = bytearray(BLOCK)
    block[SUPERBLOCK_AT : SUPERBLOCK_AT + len(fields)] = fields
    checksum = _crc32c(bytes(block[SUPERBLOCK_AT:]))
    block[CHECKSUM_AT : CHECKSUM_AT + 4] = checksum.to_bytes(4, "little")
    return bytes(block)


def _crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, B.4) without the inversion at the end, as the kernel's crc32c(~0, data)."""
    table = []
    for byte in range(256):
        entry = byte
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc
