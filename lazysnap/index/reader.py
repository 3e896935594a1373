# SPDX-License-Identifier: Apache-2.0
"""Reads an index in place: the buffer is mapped, and nothing is loaded when it is opened.

Every method takes a few microseconds and allocates only what it returns. The checksum is tested
when the index is opened; numbers are checked again whenever they are used, so that even a forged
index leads to an error and never to a crash or an endless loop.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence

from lazysnap.errors import InvalidArgument
from lazysnap.index.layout import (
    CHUNK,
    CHUNK_DIGEST,
    CHUNK_MEMBER,
    CHUNK_SIZE,
    FILE_OFFSET_AT,
    KEYS,
    MEMBER,
    NAME_PREFIX,
    NAMED,
    NO_MEMBER,
    NODE,
    NODE_SIZE,
    NUMBER,
    U64,
)
from lazysnap.index.model import NO_KEY, Chunk, FileContent, Member
from lazysnap.index.treereader import TreeIndex, damaged

_NO_MEMBER = NUMBER.pack(NO_MEMBER)


class LayerIndex(TreeIndex):
    """The index of one layer: its tree, see `TreeIndex`, and the contents of its files."""

    def file(self, node: int) -> FileContent:
        """The content of a regular file.

        Raises:
            InvalidArgument: it is none.
        """
        self._check(node, self.node_count, "node")
        mode, *_, size, _, _, first, count, _, keys, _ = NODE.unpack_from(
            self._raw, self._nodes + node * NODE_SIZE
        )
        if not stat.S_ISREG(mode):
            raise InvalidArgument(f"node {node} is not a regular file")
        return FileContent(size, first, count, *self.content_keys(first, count, keys))

    def content_keys(self, first: int, count: int, keys: int) -> tuple[bytes, bytes | None]:
        """Object key and partial key of a regular file, see `FileContent`.

        Args:
            first: its first chunk.
            count: how many chunks it has.
            keys: 1 + the number of its keys; 0: none.
        """
        if first + count > self.chunk_count or keys > self._key_count:
            raise damaged("file")
        if keys:
            at = self._keys + (keys - 1) * KEYS.size
            object_key, partial_key = KEYS.unpack_from(self._raw, at)
            return object_key, partial_key
        if count == 1:
            checked, digest = CHUNK_DIGEST.unpack_from(self._raw, self._chunks + first * CHUNK.size)
            if checked:
                return digest, None
        return NO_KEY, None

    def find(self, name: bytes) -> int:
        """A regular file with the content `name`, see `FileContent.name`, or -1."""
        (prefix,) = NAME_PREFIX.unpack_from(name)
        raw, base, size = self._raw, self._named, NAMED.size
        low, high = 0, self._named_count
        while low < high:
            middle = (low + high) // 2
            if U64.unpack_from(raw, base + middle * size)[0] < prefix:
                low = middle + 1
            else:
                high = middle
        while low < self._named_count:
            found, node = NAMED.unpack_from(raw, base + low * size)
            if found != prefix:
                break
            if self.file(node).name == name:
                return int(node)
            low += 1
        return -1

    def chunk(self, number: int) -> Chunk:
        """One chunk."""
        self._check(number, self.chunk_count, "chunk")
        node, member, offset, size, inner, checked, digest = CHUNK.unpack_from(
            self._raw, self._chunks + number * CHUNK.size
        )
        if member == NO_MEMBER:
            member = -1
        return Chunk(
            node=node,
            file_offset=offset,
            size=size,
            member=member,
            inner_offset=inner,
            digest=digest if checked else None,
        )

    def holes(self, content: FileContent) -> list[int]:
        """The chunks of a file that are all zeros, counted from its first; fast, however many it has."""
        at = self._chunks + content.first_chunk * CHUNK.size
        records = self._raw[at : at + content.chunk_count * CHUNK.size]
        if records.find(_NO_MEMBER) < 0:
            return []
        members = CHUNK_MEMBER.iter_unpack(records)
        return [number for number, (member,) in enumerate(members) if member == NO_MEMBER]

    def stored_size(self, content: FileContent) -> int:
        """How many bytes of a file are not in chunks of zeros."""
        at = self._chunks + content.first_chunk * CHUNK.size
        records = self._raw[at : at + content.chunk_count * CHUNK.size]
        if records.find(_NO_MEMBER) < 0:
            return content.size
        sizes = CHUNK_SIZE.iter_unpack(records)
        return sum(size for member, size in sizes if member != NO_MEMBER)

    def chunk_at(self, node: int, offset: int) -> int:
        """The chunk that holds the byte at `offset` of a regular file, or -1 if none does."""
        content = self.file(node)
        if not 0 <= offset < content.size:
            return -1
        low, high = content.first_chunk, content.first_chunk + content.chunk_count
        raw, base = self._raw, self._chunks + FILE_OFFSET_AT
        while high - low > 1:
            middle = (low + high) // 2
            if U64.unpack_from(raw, base + middle * CHUNK.size)[0] <= offset:
                low = middle
            else:
                high = middle
        return low

    def owner(self, chunk: int) -> int:
        """The node whose content a chunk belongs to."""
        self._check(chunk, self.chunk_count, "chunk")
        node: int = NUMBER.unpack_from(self._raw, self._chunks + chunk * CHUNK.size)[0]
        return node

    def member(self, number: int) -> Member:
        """One member; they are sorted by their place in the blob."""
        self._check(number, self.member_count, "member")
        return Member._make(MEMBER.unpack_from(self._raw, self._members + number * MEMBER.size))

    def member_chunks(self, number: int) -> Sequence[int]:
        """The chunks in a member, sorted by their place in it."""
        _, _, first, count = self.member(number)
        if first + count > self._member_chunk_count:
            raise damaged("member")
        at = self._member_chunks + first * NUMBER.size
        return struct.unpack_from(f"<{count}I", self._raw, at)
