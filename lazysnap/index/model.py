# SPDX-License-Identifier: Apache-2.0
"""What an index tells about a layer: the values that its methods return.

A *node* is an inode of the layer, numbered from 0, the root; several names (hard links) may lead to
it. A *chunk* is a run of bytes of one file that is checked as a whole. A *member* is a run of the
compressed blob that is decoded as a whole and holds one chunk or more. All numbers are positions in
the index and mean nothing outside it, but the same table of contents always gets the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

# Flags of a node.
IMPLIED = 1  # a directory that the layer does not list: its attributes are those of lower layers
OPAQUE = 2  # a directory that hides what lower layers have in it
WHITEOUT = 4  # made from a `.wh.` marker: a character device 0:0
LISTED_ROOT = 8  # the layer lists its root; an unpack ignores that, see `recorded_root`

# No file of more bytes than this many is one chunk, and no member is longer when decoded.
MAX_CHUNK_SIZE = 64 << 20
MAX_MEMBER_SIZE = MAX_CHUNK_SIZE + (1 << 20)

NO_KEY = bytes(32)


class Attributes(NamedTuple):
    """Attributes of a node."""

    mode: int  # with the type bits
    uid: int
    gid: int
    nlink: int
    rdev: int  # as os.makedev
    size: int  # in bytes; of a symbolic link, the length of its target
    mtime_ns: int
    flags: int


class FileContent(NamedTuple):
    """The content of a regular file.

    `object_key` is the sha256 of the whole file, or `NO_KEY` if the layer does not tell it. It is a
    claim, unless the file has one chunk: then it is that chunk's digest. `partial_key` is a hash
    over everything that is known of the content, including every chunk's size and digest, and None
    if the file has one chunk that `object_key` checks (or is empty).
    """

    size: int
    first_chunk: int
    chunk_count: int
    object_key: bytes
    partial_key: bytes | None

    @property
    def has_object_key(self) -> bool:
        """Whether the layer tells the digest of the whole file."""
        return self.object_key != NO_KEY

    @property
    def name(self) -> bytes:
        """What the content is called: the object key, or the partial key if there is none."""
        if self.object_key == NO_KEY and self.partial_key is not None:
            return self.partial_key
        return self.object_key


class Chunk(NamedTuple):
    """One chunk of a file. Member -1: all zeros, nothing to fetch."""

    node: int
    file_offset: int
    size: int
    member: int
    inner_offset: int  # in the decoded member
    digest: bytes | None  # sha256; None for zeros, and in layers that are not verified


class Member(NamedTuple):
    """A part of the blob that is decoded from its beginning."""

    blob_offset: int
    blob_end: int  # decoding never needs bytes from here on
    first: int  # position in the list of chunks sorted by member
    chunk_count: int
