# SPDX-License-Identifier: Apache-2.0
"""The JSON of a table of contents (TOC), decoded entry by entry.

All lazy formats share it (stargz-snapshotter docs/estargz.md, containers/storage
docs/containers-storage-zstd-chunked.md). Types are checked; meaning is not. The entries array is
decoded in windows, so that the memory in use stays near the size of the JSON even for one that is
made of tiny values. Go's encoder replaces bytes that are not UTF-8 by U+FFFD, so a name that holds
it may not be the file's name; that is for the reader of the entries to judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from lazysnap.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# More than an honest TOC of the greatest size can hold (some 75 bytes an entry).
MAX_ENTRIES = 2_000_000

_WINDOW = 256 << 10
# A window ends at a `},{`. That may be inside a string, so some are tried; one that is not
# found in this many bytes means an entry that is far too long.
_LARGEST_WINDOW = 16 << 20
_BOUNDARY = re.compile(rb"\}\s*,\s*\{")

_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(?:Z|([+-])([0-9]{2}):([0-9]{2}))",
    re.ASCII,
)
_EPOCH = datetime(1970, 1, 1)
_LATEST = 2**63 - 1


class Entry(msgspec.Struct, rename="camel", gc=False):
    """One entry of a TOC, as written; see the format documents for the fields."""

    name: str
    type: str
    size: int = 0
    modtime: str = ""
    link_name: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    offset: int = 0
    inner_offset: int = 0
    end_offset: int = 0  # containers/storage only
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, bytes | None] | None = None  # base64 in the JSON
    digest: str = ""
    chunk_offset: int = 0
    chunk_size: int = 0
    chunk_digest: str = ""
    chunk_type: str = ""  # containers/storage only: "" or "zeros"


class _Top(msgspec.Struct):
    version: int
    entries: msgspec.Raw


_top = msgspec.json.Decoder(_Top)
_list = msgspec.json.Decoder(list[Entry])


def entries(json: Buffer, limit: int = MAX_ENTRIES) -> Iterator[Entry]:
    """Decode the entries of a TOC, in order.

    Args:
        json: the uncompressed TOC.
        limit: the greatest number of entries accepted.

    Raises:
        FormatError: not such JSON, or too many entries.
    """
    try:
        top = _top.decode(json)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"table of contents is not the JSON expected: {error}") from error
    if top.version != 1:
        raise FormatError(f"table of contents has the unknown version {top.version}")
    count = 0
    for window in _windows(memoryview(top.entries)):
        count += len(window)
        if count > limit:
            raise FormatError(f"table of contents has more than {limit} entries")
        yield from window


def _windows(array: memoryview) -> Iterator[list[Entry]]:
    """The entries of a JSON array, some at a time."""
    if bytes(array[:5]) == b"null":  # Go's encoding of an empty list
        return
    if bytes(array[:1]) != b"[":
        raise FormatError("table of contents: entries are not a list")
    at, last = 1, len(array) - 1
    while at < last:
        length = _WINDOW
        while True:
            boundary = _BOUNDARY.search(array, at + length)
            end = boundary.start() + 1 if boundary else last
            try:
                window = _list.decode(b"".join((b"[", array[at:end], b"]")))
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                length *= 2
                if boundary and length <= _LARGEST_WINDOW:
                    continue
                raise FormatError(f"table of contents has a wrong entry: {error}") from error
            break
        yield window
        at = boundary.end() - 1 if boundary else last


def parse_time(text: str) -> int:
    """A time in nanoseconds since 1970, as an unpack would set it.

    Args:
        text: RFC 3339, as Go writes it; the empty string is 1970.

    Returns:
        0 for times that do not fit between 1970 and 2262, as containerd does (archive.boundTime).

    Raises:
        FormatError: not a time.
    """
    if not text:
        return 0
    match = _TIME.fullmatch(text)
    if match is None:
        raise FormatError(f"table of contents: not a time: {text[:100]!r}")
    date, fraction, sign, hours, minutes = match.groups()
    try:
        span = datetime.fromisoformat(date) - _EPOCH
    except ValueError as error:
        raise FormatError(f"table of contents: not a time: {text[:100]!r}") from error
    seconds = span.days * 86400 + span.seconds
    if sign:
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds -= offset if sign == "+" else -offset
    nanoseconds = seconds * 10**9 + (int(fraction.ljust(9, "0")) if fraction else 0)
    return nanoseconds if 0 <= nanoseconds <= _LATEST else 0
