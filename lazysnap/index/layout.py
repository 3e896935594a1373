# SPDX-License-Identifier: Apache-2.0
"""The bytes of an index: little-endian records of fixed width, in sections.

    magic, version, CRC32 of all that follows, total length
    facts about the layer (`FACTS`)
    for each section: offset, length in bytes
    sections, each aligned to 8 bytes

A change of any of these is a new `VERSION`; an index of another version is built again.
"""

from __future__ import annotations

import struct

MAGIC = b"lzsnapix"
VERSION = 2

# magic, version, checksum of everything behind this field, total length
PREAMBLE = struct.Struct("<8sIIQ")
CHECKED_FROM = 16

# kind, compression, verified, pad, blob size, TOC offset, data end, prefetch end (-1: none),
# sum of file sizes, sha256 of the TOC, the listed root: mode (0: not listed), uid, gid, mtime
FACTS = struct.Struct("<BBBxIQQQqQ32sIIIIq")

SECTION = struct.Struct("<QQ")
(
    NODES,
    DIRENTS,
    IMPLIED_NODES,
    CONTENT_KEYS,
    CHUNKS,
    MEMBERS,
    MEMBER_CHUNKS,
    XATTRS,
    TEXT,
    BY_NAME,
) = range(10)
SECTION_COUNT = 10

# As `Attributes`: mode, uid, gid, nlink, rdev, size, mtime, flags. Then, by type:
#   directory: first dirent, number of dirents
#   regular file: first chunk, number of chunks
#   symbolic link: offset and length of the target in TEXT
# then 1 + offset in XATTRS (0: none), 1 + number in CONTENT_KEYS (0: none), number of the dirent
# that is its first name (NO_DIRENT: the root)
NODE = struct.Struct("<IIIIQQqIIIIII")
NODE_SIZE = 64
ATTRIBUTES = struct.Struct("<IIIIQQqI")
PLACE = struct.Struct("<IIIII")  # the rest of NODE
PLACE_AT = ATTRIBUTES.size

# Offset and length of the name in TEXT, node, directory that it is in. Those of a directory are
# together, sorted by name.
DIRENT = struct.Struct("<IHxxII")
DIRENT_SIZE = 16
NO_DIRENT = 2**32 - 1
# First 8 bytes of a content's name as a number, and a node that has it; sorted, each content once.
NAMED = struct.Struct("<QI")
NAME_PREFIX = struct.Struct(">Q")
NUMBER = struct.Struct("<I")
KEYS = struct.Struct("<32s32s")  # object key, partial key
# node, member (NO_MEMBER: zeros), file offset, size, inner offset, 1 if there is a digest, digest
CHUNK = struct.Struct("<IIQQIB3x32s")
CHUNK_MEMBER = struct.Struct("<4xI56x")  # of a chunk, the member alone
CHUNK_SIZE = struct.Struct("<4xI8xQ40x")  # of a chunk, member and size
CHUNK_DIGEST = struct.Struct("<28xB3x32s")  # of a chunk, whether there is a digest, and that
NO_MEMBER = 2**32 - 1
FILE_OFFSET_AT = 8
U64 = struct.Struct("<Q")
MEMBER = struct.Struct("<QQII")  # blob offset, blob end, first member chunk, count
XATTR_COUNT = struct.Struct("<H")
XATTR = struct.Struct("<HI")  # lengths of name and value, which follow

RECORD_SIZES = {
    NODES: NODE.size,
    DIRENTS: DIRENT.size,
    IMPLIED_NODES: NUMBER.size,
    CONTENT_KEYS: KEYS.size,
    CHUNKS: CHUNK.size,
    MEMBERS: MEMBER.size,
    MEMBER_CHUNKS: NUMBER.size,
    XATTRS: 1,
    TEXT: 1,
    BY_NAME: NAMED.size,
}

KINDS = ("estargz", "stargz", "zstd:chunked")
COMPRESSIONS = ("gzip", "zstd")

assert NODE.size == NODE_SIZE
assert DIRENT.size == DIRENT_SIZE
assert CHUNK_MEMBER.size == CHUNK_DIGEST.size == CHUNK_SIZE.size == CHUNK.size
assert ATTRIBUTES.size + PLACE.size == NODE_SIZE
