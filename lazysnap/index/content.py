# SPDX-License-Identifier: Apache-2.0
"""The chunks of a layer's files: checked, keyed, and grouped into members.

Keeps the invariant that a file's chunks cover it exactly and in order, that every chunk has
something to check it by (unless the layer is trusted without), and that no member needs more memory
than `MAX_MEMBER_SIZE` to decode, nor holds a byte of two chunks.
"""

from __future__ import annotations

import hashlib
import struct
from binascii import unhexlify
from itertools import pairwise
from typing import NamedTuple

import msgspec

from lazysnap.errors import FormatError, NotLazy
from lazysnap.formats.location import CONVERT_HINT, TocLocation
from lazysnap.formats.toc import Entry
from lazysnap.index.layout import NO_MEMBER
from lazysnap.index.model import MAX_CHUNK_SIZE, MAX_MEMBER_SIZE, NO_KEY

_PREFIX = "sha256:"
_DIGEST_LENGTH = len(_PREFIX) + 64
_LENGTHS = struct.Struct("<QB")
# A block of a decoder may reach beyond the wanted bytes: a zstd block is up to 128 KiB, deflate
# codes are up to 15 bits for a byte. Twice the bytes and this much more always is enough.
_SLACK = 256 << 10
# A read looks at each chunk that it touches, and fetching at each chunk of a member, both while nobody
# else is served. So many chunks of one file may be smaller than that, and so many be in one member.
_SMALL_CHUNK, _SMALL_CHUNKS_MOST = 512, 4096
_MEMBER_CHUNKS_MOST = 16_384
# More than any inner offset: the place of a chunk as one number.
_MEMBER_STRIDE = 1 << 32
assert MAX_MEMBER_SIZE < _MEMBER_STRIDE


class Piece(msgspec.Struct, gc=False):
    """A chunk before members have numbers."""

    file_offset: int
    size: int
    blob_offset: int  # -1: zeros
    inner_offset: int
    digest: bytes  # empty: zeros, or nothing to check by


class Content(msgspec.Struct, gc=False):
    """The content of a regular file that is not empty."""

    size: int
    digest: bytes  # sha256 of the file; empty if not told
    pieces: list[Piece]

    def keys(self, layer: bytes) -> tuple[bytes, bytes]:
        """The object key and the partial key, see `FileContent`.

        Args:
            layer: raw digest of the table of contents. It separates the contents that nothing
                checks from those of all other layers.
        """
        hasher = hashlib.sha256(b"lazysnap file 1\0")
        hasher.update(self.digest or NO_KEY)
        checked = True
        for piece in self.pieces:
            zeros = piece.blob_offset < 0
            hasher.update(_LENGTHS.pack(piece.size, zeros))
            hasher.update(piece.digest or NO_KEY)
            if not zeros and not piece.digest:
                checked = False
                hasher.update(_LENGTHS.pack(piece.blob_offset, 0))
                hasher.update(_LENGTHS.pack(piece.inner_offset, 0))
        if not checked:
            return NO_KEY, hashlib.sha256(
                b"lazysnap unverified 1\0" + layer + hasher.digest()
            ).digest()
        return self.digest or NO_KEY, hasher.digest()


class Members(NamedTuple):
    """The members of a layer, see `Member`, sorted by their place in the blob, and who is in them.

    Attributes:
        blob_offsets: of each member.
        blob_ends: of each member.
        firsts: position of each member's first chunk in `chunks`.
        chunks: by their position among all chunks, sorted by their place.
        numbers: of the member of each chunk; `NO_MEMBER` for zeros.
    """

    blob_offsets: list[int]
    blob_ends: list[int]
    firsts: list[int]
    chunks: list[int]
    numbers: list[int]


def parse_digest(text: str) -> bytes:
    """The raw sha256 of a digest in a table of contents; empty for the empty string.

    Raises:
        FormatError: not a sha256 digest.
    """
    if not text:
        return b""
    if len(text) == _DIGEST_LENGTH and text.startswith(_PREFIX):
        try:
            return unhexlify(text[len(_PREFIX) :])
        except ValueError:
            pass
    raise FormatError(f"table of contents: not a sha256 digest: {text[:100]!r}")


class Contents:
    """Collects the entries of one layer's regular files, and then finds the members."""

    def __init__(self, location: TocLocation, *, verified: bool) -> None:
        self._data_end = location.data_end
        self._verified = verified
        # All places where compressed data is known to begin or end, of hidden files too. Nearly sorted.
        self._boundaries = [location.data_end]

    def collect_one(self, entry: Entry) -> Content | None:
        """The content of a file that is plainly right and one chunk, as nearly all are.

        Args:
            entry: the `reg` entry.

        Returns:
            None for what is anything else, and for `collect` to judge. `chunk` entries may follow
            only then.

        Raises:
            FormatError: the digest is none.
        """
        size, offset, end, digest = entry.size, entry.offset, entry.end_offset, entry.digest
        if (
            not 0 < size <= MAX_CHUNK_SIZE
            or entry.chunk_size not in (0, size)
            or entry.chunk_offset
            or entry.chunk_type
            or not 0 <= offset < self._data_end
            or not 0 <= end <= self._data_end
            or not 0 <= entry.inner_offset <= MAX_MEMBER_SIZE - size
            or not digest
            or entry.chunk_digest not in ("", digest)
        ):
            return None
        self._boundaries.append(offset)
        if end:
            self._boundaries.append(end)
        raw = parse_digest(digest)
        return Content(size, raw, [Piece(0, size, offset, entry.inner_offset, raw)])

    def collect(self, entries: list[Entry]) -> Content | None:
        """Check the entries of one file.

        Args:
            entries: the `reg` entry and the `chunk` entries that follow it.

        Returns:
            None for an empty file.

        Raises:
            FormatError: they contradict each other.
            NotLazy: reason `chunk-too-large`, `too-costly` or `unverified-chunks`.
        """
        first = entries[0]
        size = first.size
        if not 0 <= size < 1 << 63:
            raise FormatError(f"{_named(first)} has the size {size}")
        if size == 0:
            if len(entries) > 1:
                raise FormatError(f"{_named(first)} is empty but has chunks")
            return None
        digest = parse_digest(first.digest)
        if len(entries) == 1 and digest and first.chunk_digest not in ("", first.digest):
            raise FormatError(f"{_named(first)} has one chunk and two digests")
        pieces = []
        at = 0
        for entry in entries:
            piece = self._piece(entry, at, size, digest if len(entries) == 1 else b"")
            at += piece.size
            pieces.append(piece)
        if at != size:
            raise FormatError(f"{_named(first)} has {size} bytes but chunks of {at}")
        small = sum(piece.size < _SMALL_CHUNK for piece in pieces)
        if small > _SMALL_CHUNKS_MOST:
            raise _too_costly(f"{_named(first)} has {small} chunks of next to nothing")
        if first.end_offset:
            self._bound(first, first.end_offset)
        return Content(size, digest, pieces)

    def _piece(self, entry: Entry, at: int, file_size: int, fallback: bytes) -> Piece:
        """One chunk, which must begin at `at`."""
        size = entry.chunk_size or file_size - entry.chunk_offset
        if entry.chunk_offset != at or size <= 0 or at + size > file_size:
            raise FormatError(
                f"{_named(entry)} has a chunk at {entry.chunk_offset}+{entry.chunk_size} where"
                f" one at {at} of at most {file_size - at} bytes is due"
            )
        offset, inner = entry.offset, entry.inner_offset
        self._bound(entry, offset)
        if entry.chunk_type == "zeros":
            return Piece(at, size, -1, 0, b"")
        if offset >= self._data_end:
            raise FormatError(f"{_named(entry)} has a chunk at {offset}, behind the data")
        if entry.chunk_type:
            raise FormatError(f"{_named(entry)} has a chunk of type {entry.chunk_type[:100]!r}")
        if inner < 0:
            raise FormatError(f"{_named(entry)} has the inner offset {inner}")
        if size > MAX_CHUNK_SIZE or inner + size > MAX_MEMBER_SIZE:
            raise NotLazy(
                f"{_named(entry)} has a chunk of {size} bytes at {inner} of its member, which is"
                " too much to decode at once",
                hint=CONVERT_HINT,
                reason="chunk-too-large",
            )
        digest = fallback or parse_digest(entry.chunk_digest)
        if not digest and self._verified:
            raise NotLazy(
                f"{_named(entry)} has a chunk without a digest",
                hint=CONVERT_HINT,
                reason="unverified-chunks",
            )
        return Piece(at, size, offset, inner, digest)

    def _bound(self, entry: Entry, offset: int) -> None:
        if not 0 <= offset <= self._data_end:
            raise FormatError(f"{_named(entry)} points to {offset}, outside the layer's data")
        self._boundaries.append(offset)

    def members(self, pieces: list[Piece]) -> Members:
        """The members that chunks are in.

        Args:
            pieces: all chunks of the finished tree.

        Raises:
            FormatError: two chunks overlap.
            NotLazy: reason `too-costly`.
        """
        following = dict(pairwise(sorted(self._boundaries)))  # of equal ones the last counts
        places = [piece.blob_offset * _MEMBER_STRIDE + piece.inner_offset for piece in pieces]
        chunks = [number for number, place in enumerate(places) if place >= 0]
        chunks.sort(key=places.__getitem__)
        offsets: list[int] = []
        filled: list[int] = []  # behind the last chunk of each member
        firsts: list[int] = []
        numbers = [NO_MEMBER] * len(pieces)
        at = -1
        for position, chunk in enumerate(chunks):
            piece = pieces[chunk]
            inner = piece.inner_offset
            if piece.blob_offset != at:
                at = piece.blob_offset
                offsets.append(at)
                firsts.append(position)
                filled.append(0)
            if inner < filled[-1]:
                raise FormatError(f"two files share bytes of the member at {at}")
            filled[-1] = inner + piece.size
            numbers[chunk] = len(offsets) - 1
        most = max((end - begin for begin, end in pairwise([*firsts, len(chunks)])), default=0)
        if most > _MEMBER_CHUNKS_MOST:
            raise _too_costly(f"a member of the layer has {most} chunks")
        ends = [
            min(following[offset], offset + 2 * size + _SLACK)
            for offset, size in zip(offsets, filled, strict=True)
        ]
        return Members(offsets, ends, firsts, chunks, numbers)


def _too_costly(why: str) -> NotLazy:
    return NotLazy(f"{why}, which would keep others waiting", reason="too-costly")


def _named(entry: Entry) -> str:
    return f"file {entry.name[:200]!r}"
