# SPDX-License-Identifier: Apache-2.0
"""One gzip member at a time, with a bound on what comes out.

Lazy layers start a new member at every payload, so that decoding can begin there (RFC 1952, and
stargz-snapshotter docs/estargz.md). The bytes behind the wanted ones are not decoded, and so the
CRC in the member's trailer is not checked: callers check a digest. The decoder (isal) releases the
GIL. Knows nothing of layers.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, cast

from isal import isal_zlib

from lazysnap.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"\x1f\x8b"
# The stubs of isal call it an instance, not a class.
_Damaged: type[Exception] = cast("type[Exception]", isal_zlib.error)
_FIXED = struct.Struct("<2sBBIBB")
_DEFLATE = 8
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 2, 4, 8, 16, 0xE0


class Header(NamedTuple):
    """The header of a gzip member."""

    extra: bytes  # the Extra field without its length; empty if there is none
    length: int  # of the whole header, in bytes


def parse_header(data: Buffer) -> Header:
    """Parse the gzip header that `data` begins with (RFC 1952 section 2.3).

    Raises:
        FormatError: there is none, or it is cut off.
    """
    view = memoryview(data)
    if len(view) < _FIXED.size:
        raise FormatError("gzip header is cut off")
    magic, method, flags, _, _, _ = _FIXED.unpack_from(view)
    if magic != MAGIC or method != _DEFLATE or flags & _RESERVED:
        raise FormatError("not a gzip header")
    at, extra = _FIXED.size, b""
    if flags & _FEXTRA:
        length = int.from_bytes(view[at : at + 2], "little")
        extra = bytes(view[at + 2 : at + 2 + length])
        at += 2 + length
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            text = bytes(view[at : at + 4096]).find(b"\0")
            if text < 0:
                raise FormatError("gzip header has an unterminated or very long text")
            at += text + 1
    if flags & _FHCRC:
        at += 2
    if at > len(view):
        raise FormatError("gzip header is cut off")
    return Header(extra, at)


def inflate_at_most(data: Buffer, limit: int) -> bytes:
    """Decode the member that `data` begins with, up to its end or `limit`.

    Args:
        data: at least one member; what follows it is ignored.
        limit: stop after this many decoded bytes.

    Raises:
        FormatError: not gzip, or `data` ends before the member and the limit.
    """
    if limit <= 0:
        return b""
    decoder = isal_zlib.decompressobj(wbits=31)
    try:
        out: bytes = decoder.decompress(data, limit)
    except _Damaged as error:
        raise FormatError(f"gzip member is damaged: {error}") from error
    if not decoder.eof and len(out) < limit:
        raise FormatError(f"gzip member is cut off after {len(out)} decoded bytes")
    return out


def inflate(data: Buffer, size: int) -> bytes:
    """Decode the first `size` bytes of the member that `data` begins with.

    Args:
        data: the member, or enough of its beginning.
        size: how many decoded bytes are wanted; never are more decoded or allocated.

    Returns:
        Exactly `size` bytes.

    Raises:
        FormatError: not gzip, or it holds fewer bytes.
    """
    out = inflate_at_most(data, size)
    if len(out) != size:
        raise FormatError(f"gzip member holds {len(out)} bytes, expected {size}")
    return out
