# SPDX-License-Identifier: Apache-2.0
"""gzip members, against the standard library's gzip."""

from __future__ import annotations

import gzip as stdlib
import io
import struct
import tracemalloc

import pytest

from lazysnap.errors import FormatError
from lazysnap.formats import gzip

DATA = b"".join(b"line %d\n" % i for i in range(50_000))


def test_inflates_the_beginning_and_all() -> None:
    packed = stdlib.compress(DATA)
    for size in (0, 1, 4096, len(DATA)):
        assert gzip.inflate(packed, size) == DATA[:size]


def test_stops_at_the_end_of_the_member() -> None:
    packed = stdlib.compress(b"first") + stdlib.compress(b"second")
    assert gzip.inflate_at_most(packed, 100) == b"first"
    with pytest.raises(FormatError, match="holds 5 bytes, expected 6"):
        gzip.inflate(packed, 6)


@pytest.mark.parametrize("data", [b"", b"\x1f", b"garbage, not gzip", b"\x1f\x8b\x08" + bytes(99)])
def test_garbage(data: bytes) -> None:
    with pytest.raises(FormatError):
        gzip.inflate(data, 1)


def test_cut_member() -> None:
    packed = stdlib.compress(DATA)
    with pytest.raises(FormatError, match="cut off"):
        gzip.inflate(packed[: len(packed) // 2], len(DATA))


def test_a_bomb_costs_no_more_than_was_asked_for() -> None:
    bomb = stdlib.compress(bytes(200 << 20))
    tracemalloc.start()
    try:
        assert gzip.inflate(bomb, 1000) == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(bomb)
    finally:
        tracemalloc.stop()


def test_parses_the_header_that_the_standard_library_writes() -> None:
    packed = io.BytesIO()
    with stdlib.GzipFile("a name", "wb", fileobj=packed) as out:
        out.write(b"data")
    assert gzip.parse_header(packed.getvalue()) == (b"", 10 + len("a name") + 1)


def test_parses_all_optional_fields() -> None:
    header = (
        b"\x1f\x8b\x08\x1e" + bytes(6) + struct.pack("<H", 3) + b"abc" + b"n\0" + b"c\0" + b"\1\2"
    )
    assert gzip.parse_header(header + b"rest") == (b"abc", len(header))
    for end in range(len(header)):
        with pytest.raises(FormatError):
            gzip.parse_header(header[:end])


@pytest.mark.parametrize("flags", [0x20, 0x80])
def test_refuses_reserved_flags(flags: int) -> None:
    with pytest.raises(FormatError):
        gzip.parse_header(b"\x1f\x8b\x08" + bytes([flags]) + bytes(20))
