# SPDX-License-Identifier: Apache-2.0
"""The headers of a tar: ustar, GNU, PAX and star, one block or record list at a time.

Sources: POSIX.1-2017 pax(1), GNU tar's manual (Tar Internals, Storing Sparse Files), star(5). Where
readers differ this follows Go's archive/tar, which containerd reads layers with: a reader that took
another entry for real would make another tree of the same, verified bytes. Does no I/O.
"""

from __future__ import annotations

import functools
import re
import struct
import zlib
from typing import NamedTuple

from lazysnap.errors import FormatError

BLOCK = 512

FILE, OLD_FILE, CONTIGUOUS, GNU_SPARSE = b"0", b"\0", b"7", b"S"
HARD_LINK, SYMLINK, DIRECTORY = b"1", b"2", b"5"
CHAR, BLOCK_DEVICE, FIFO = b"3", b"4", b"6"
PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK = b"x", b"g", b"L", b"K"

WITHOUT_DATA = frozenset({HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO})
"""Types behind whose header no data follow, whatever size it claims."""

MAX_SPARSE_PIECES = 1 << 20
"""Of one file; more would only be made to use up memory."""

_ZEROS = bytes(BLOCK)
# name mode uid gid size mtime checksum type link magic+version uname gname major minor, the rest
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s32x32x8s8s167s")
_USTAR, _GNU, _STAR_TRAILER = b"ustar\x0000", b"ustar  \x00", b"tar\0"
_MOST = (1 << 63) - 1
_DECIMAL = re.compile(rb"-?[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


class Header(NamedTuple):
    """One header block; texts are bytes, as tar has no character set."""

    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    """As the block says; of the data that follow, unless a PAX record says otherwise."""
    mtime: int
    """Seconds since 1970."""
    kind: bytes
    link: bytes
    device: tuple[int, int]


def parse_header(block: bytes) -> Header | None:
    """Read a header block.

    Args:
        block: 512 bytes.

    Returns:
        None for a block of zeros.

    Raises:
        FormatError: it is none.
    """
    if block == _ZEROS:
        return None
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, major, minor, rest) = (
        _FIELDS.unpack(block)
    )
    _check_sum(block, _number(checksum))
    name = name.partition(b"\0")[0]
    device = (0, 0)
    if magic in (_USTAR, _GNU):
        if magic == _USTAR:
            star = rest[-4:] == _STAR_TRAILER
            prefix = rest[: 131 if star else 155].partition(b"\0")[0]
            if prefix:
                name = prefix + b"/" + name
        if kind in (CHAR, BLOCK_DEVICE):
            device = _number(major), _number(minor)
    length = _number(size)
    if not 0 <= length <= _MOST:
        raise FormatError(f"a tar entry of {length} bytes")
    if kind == OLD_FILE and name.endswith(b"/"):
        kind = DIRECTORY
    return Header(
        name=name,
        mode=_number(mode),
        uid=_number(uid),
        gid=_number(gid),
        size=length,
        mtime=_number(mtime),
        kind=kind,
        link=link.partition(b"\0")[0],
        device=device,
    )


def _check_sum(block: bytes, claimed: int) -> None:
    # The lower half of adler32 is the sum of the bytes plus 1, exactly so for up to 256 of them, and takes
    # a tenth of the time.
    low, high = zlib.adler32(block[:256]) & 0xFFFF, zlib.adler32(block[256:]) & 0xFFFF
    total = low + high - 2 - sum(block[148:156]) + 8 * 32
    if total == claimed:
        return
    # some old writers added signed bytes
    negative = sum(byte >= 128 for byte in block[:148] + block[156:])
    if total - 256 * negative != claimed:
        raise FormatError("not a tar header: its checksum is wrong")


@functools.lru_cache(maxsize=1024)  # owners, modes and sizes are the same again and again
def _number(field: bytes) -> int:
    """A number field: octal text, or two's complement with the highest bit set (GNU, star)."""
    digits = field[:-1]
    if digits.isdigit():  # by far the most frequent form
        try:
            return int(digits if field[-1] in b"\0 " else field, 8)
        except ValueError as error:
            raise FormatError(f"not a number in a tar header: {field!r}") from error
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        # the topmost bit is the mark, the next one the sign
        return value - (1 << bits) if field[0] & 0x40 else value - (1 << (bits - 1))
    text = field.strip(b" \0").partition(b"\0")[0]
    if not text:
        return 0
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise FormatError(f"not a number in a tar header: {field!r}")
    return int(text, 8)


def parse_pax(data: bytes) -> list[tuple[bytes, bytes]]:
    """Read the records of an extended header.

    Args:
        data: all of it.

    Returns:
        Keys and values, in their order; `GNU.sparse.offset` and the like come several times.

    Raises:
        FormatError: they are malformed.
    """
    records: list[tuple[bytes, bytes]] = []
    at, end = 0, len(data)
    while at < end:
        if data[at] == 0 and not data[at:].strip(b"\0"):
            break  # padding that some writers count in
        blank = data.find(b" ", at, at + 20)
        digits = data[at:blank] if blank > 0 else b""
        if not digits.isdigit():
            raise FormatError("a PAX record does not begin with its length")
        stop = at + int(digits)
        equals = data.find(b"=", blank, stop)
        if stop > end or data[stop - 1 : stop] != b"\n" or equals <= blank + 1:
            raise FormatError("a PAX record is malformed or cut off")
        key, value = data[blank + 1 : equals], data[equals + 1 : stop - 1]
        if b"\0" in key or (b"\0" in value and key in _TEXTS):
            raise FormatError(f"a zero byte in the PAX record {key[:100]!r}")
        records.append((key, value))
        at = stop
    return records


_TEXTS = frozenset({b"path", b"linkpath", b"uname", b"gname"})


def decimal(value: bytes, what: str) -> int:
    """A decimal number of a PAX record.

    Raises:
        FormatError: it is something else.
    """
    if not _DECIMAL.fullmatch(value):
        raise FormatError(f"the PAX record {what} is not a number: {value[:50]!r}")
    return int(value)


def nanoseconds(value: bytes, what: str) -> int:
    """A time of a PAX record, in nanoseconds since 1970; what is finer is cut off.

    Raises:
        FormatError: it is something else.
    """
    match = _TIME.fullmatch(value)
    if match is None:
        raise FormatError(f"the PAX record {what} is not a time: {value[:50]!r}")
    total = int(match[2]) * 10**9 + int((match[3] or b"")[:9].ljust(9, b"0"))
    return -total if match[1] else total


# -- sparse files -------------------------------------------------------------------------------------

Pieces = list[tuple[int, int]]
"""Offset and length of each piece of a file that is stored; the rest is holes."""

_OLD_PIECES = struct.Struct("12s12s")


def gnu_sparse_head(block: bytes) -> tuple[Pieces, int, bool]:
    """The beginning of the map of a file of type `GNU_SPARSE`, from its header block.

    Returns:
        Pieces, the file's real size, whether more follow in a block of its own.
    """
    return _old_pieces(block[386:482]), _number(block[483:495]), block[482] != 0


def gnu_sparse_more(block: bytes) -> tuple[Pieces, bool]:
    """More of the map; returns pieces, and whether more follow."""
    return _old_pieces(block[:504]), block[504] != 0


def _old_pieces(data: bytes) -> Pieces:
    return [
        (_number(offset), _number(length))
        for offset, length in _OLD_PIECES.iter_unpack(data)
        if offset[0]
    ]


def pax_sparse(records: list[tuple[bytes, bytes]]) -> Pieces | None:
    """The map of formats 0.0 and 0.1, which is in PAX records; None if there is none.

    Raises:
        FormatError: it is malformed.
    """
    numbers: list[bytes] = []
    for key, value in records:
        if key == b"GNU.sparse.map":
            numbers = value.split(b",") if value else []
            break
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.offset") != (len(numbers) % 2 == 0):
                raise FormatError("the map of a sparse file is out of order")
            numbers.append(value)
    else:
        if not numbers and not any(key == b"GNU.sparse.numblocks" for key, _ in records):
            return None
    if len(numbers) % 2:
        raise FormatError("the map of a sparse file has an odd number of numbers")
    values = [decimal(number, "GNU.sparse.map") for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


class SparseText:
    """The map of format 1.0: decimal lines before the data, padded to whole blocks."""

    def __init__(self) -> None:
        self._rest = b""
        self._wanted = -1
        self._numbers: list[int] = []

    def feed(self, block: bytes) -> Pieces | None:
        """Take a block; returns the map when it is complete.

        Raises:
            FormatError: it is malformed.
        """
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            number = decimal(line, "sparse map")
            if self._wanted < 0:
                if not 0 <= number <= MAX_SPARSE_PIECES:
                    raise FormatError(f"a sparse file of {number} pieces")
                self._wanted = 2 * number
            else:
                self._numbers.append(number)
            if len(self._numbers) == self._wanted:
                return list(zip(self._numbers[::2], self._numbers[1::2], strict=True))
        if len(self._rest) > 64:
            raise FormatError("the map of a sparse file is malformed")
        return None


def check_sparse(pieces: Pieces, stored: int, size: int) -> None:
    """Check a map against the sizes.

    Args:
        pieces: the map.
        stored: bytes of data that the tar has.
        size: of the file.

    Raises:
        FormatError: it contradicts itself or them.
    """
    at = total = 0
    for offset, length in pieces:
        if offset < at or length < 0 or offset + length > size:
            raise FormatError("the map of a sparse file contradicts itself")
        at = offset + length
        total += length
    if total != stored:
        raise FormatError(f"the map of a sparse file tells of {total} bytes, {stored} are there")
