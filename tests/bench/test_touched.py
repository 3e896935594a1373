# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import random

from tests.bench.touched import compressed_bytes
from tests.support import layers

DATA = random.Random(4).randbytes(250_000)
LAYER = layers.estargz(
    [
        layers.directory("d"),
        layers.file("d/long", DATA),
        layers.file("short", b"s" * 100),
        layers.hardlink("link", "d/long"),
        layers.file("empty", b""),
    ],
    chunk_size=100_000,
)
SLACK = 1_500  # tar headers and gzip, of bytes that do not compress


def touched(*reads: tuple[str, int, int]) -> int:
    return compressed_bytes(LAYER.blob, reads)


def test_chunks_are_counted_whole_and_once() -> None:
    one = touched(("d/long", 0, 1))
    assert 100_000 < one < 100_000 + SLACK
    assert touched(("d/long", 99_999, 1), ("d/long", 5, 5)) == one
    two = touched(("d/long", 99_999, 2))
    assert 200_000 < two < 200_000 + SLACK
    last = touched(("d/long", 200_000, 1_000_000))
    assert 50_000 < last < 50_000 + SLACK
    assert touched(("d/long", 0, 250_000)) == two + last


def test_names() -> None:
    assert touched(("link", 0, 1)) == touched(("d/long", 0, 1))
    assert 0 < touched(("short", 0, 100)) < SLACK
    assert touched(("empty", 0, 1), ("d", 0, 1), ("none", 0, 1)) == 0
    assert touched() == 0
