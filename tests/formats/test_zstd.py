# SPDX-License-Identifier: Apache-2.0
"""zstd frames with a bound."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import zstandard

from lazysnap.errors import FormatError
from lazysnap.formats import zstd

DATA = b"".join(b"line %d\n" % i for i in range(50_000))


def test_inflates_the_beginning_and_all() -> None:
    packed = zstandard.compress(DATA)
    for size in (0, 1, 4096, len(DATA)):
        assert zstd.inflate(packed, size) == DATA[:size]


def test_goes_on_across_frames_and_skippable_ones() -> None:
    skippable = struct.pack("<II", zstd.SKIPPABLE_MAGIC, 3) + b"xyz"
    packed = zstandard.compress(b"first") + skippable + zstandard.compress(b"second")
    assert zstd.inflate(packed, 11) == b"firstsecond"
    with pytest.raises(FormatError, match="hold 11 bytes, expected 12"):
        zstd.inflate(packed, 12)


@pytest.mark.parametrize("data", [b"", b"(", b"garbage, not zstd", zstd.MAGIC + bytes(99)])
def test_garbage(data: bytes) -> None:
    with pytest.raises(FormatError):
        zstd.inflate(data, 1)


def test_cut_frame() -> None:
    packed = zstandard.compress(DATA)
    with pytest.raises(FormatError):
        zstd.inflate(packed[: len(packed) // 2], len(DATA))


def test_a_bomb_costs_no_more_than_was_asked_for() -> None:
    bomb = zstandard.compress(bytes(200 << 20))
    tracemalloc.start()
    try:
        assert zstd.inflate(bomb, 1000) == bytes(1000)
        with pytest.raises(FormatError):
            zstd.inflate(zstandard.compress(b"little"), 1 << 40)  # a claim alone allocates little
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_refuses_a_huge_window() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(b"x" * 100) + compressor.flush()
    with pytest.raises(FormatError):
        zstd.inflate(packed, 100)
