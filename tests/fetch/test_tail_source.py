# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lazysnap.errors import LazysnapError, RegistryUnreachable
from lazysnap.fetch.byte_source import Counters, LocalBytes
from lazysnap.fetch.tail_source import TailSource
from lazysnap.layers.blob_tail import SIZE_MOST, open_tail, read_tail, write_tail
from tests.fetch.engine import MemorySource

BLOB = random.Random(5).randbytes(1_000_000)
START, STOP = 300_000, 900_000


class Scene:
    """A source with a tail, read as a fetcher reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.network = MemorySource(BLOB)
        self.counters = Counters()
        write_tail(str(path), START, BLOB[START:STOP])
        self.again()

    def again(self) -> None:
        """As after a restart."""
        self.source = TailSource(self.network, str(self.path.with_suffix("")), self.counters)

    async def read(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Read a range, which must be right; the ranges that were asked of the network for it."""
        before = len(self.network.requests)
        self.counters.requests += 1
        data = b""
        async with self.source.read_stream(start, stop - start) as stream:
            async for piece in stream:
                if not isinstance(piece, LocalBytes):
                    self.counters.bytes_fetched += len(piece)
                data += piece
        assert data == BLOB[start:stop]
        asked = self.network.requests
        assert self.counters.requests == len(asked)
        assert self.counters.bytes_fetched == sum(length for _, length in asked)
        return [(begin, begin + length) for begin, length in asked[before:]]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "index.tail")


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        ((START, STOP), []),
        ((START, START + 1), []),
        ((STOP - 1, STOP), []),
        ((400_000, 800_000), []),
        ((0, START), [(0, START)]),
        ((0, START + 1), [(0, START)]),
        ((START - 1, STOP), [(START - 1, START)]),
        ((STOP, 1_000_000), [(STOP, 1_000_000)]),
        ((STOP - 1, STOP + 1), [(STOP - 1, STOP + 1)]),
        ((0, 1_000_000), [(0, 1_000_000)]),
    ],
)
async def test_only_what_is_not_held_is_asked_for(
    scene: Scene, wanted: tuple[int, int], asked: list[tuple[int, int]]
) -> None:
    assert await scene.read(*wanted) == asked


async def test_bytes_come_from_the_tail_once(scene: Scene) -> None:
    """What is asked for again was wrong, and must not come from the same place for ever."""
    assert await scene.read(400_000, 500_000) == []
    assert await scene.read(450_000, 460_000) == [(450_000, 460_000)]
    assert await scene.read(500_000, 600_000) == []
    assert await scene.read(START, 400_000) == []
    assert await scene.read(350_000, 550_000) == [(350_000, 550_000)]
    assert await scene.read(600_000, STOP) == []
    scene.again()
    assert await scene.read(START, STOP) == []


async def test_what_was_not_handed_out_still_comes_from_the_tail(scene: Scene) -> None:
    def broken(data: bytes) -> bytes:
        raise RegistryUnreachable("gone")

    scene.network.script = [broken]
    with pytest.raises(LazysnapError):
        async with scene.source.read_stream(START - 10, 1000) as stream:
            async for _ in stream:
                pass
    scene.network.requests.clear()
    assert await scene.read(START - 10, START + 990) == [(START - 10, START)]


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda packed: packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda packed: b"",
    "half a header": lambda packed: packed[:20],
    "no bytes": lambda packed: packed[:48],
    "cut off": lambda packed: packed[:-1],
    "longer": lambda packed: packed + b"x",
    "huge": lambda packed: packed + bytes(SIZE_MOST),
    "magic": _flip(0),
    "offset": _flip(9),
    "digest": _flip(20),
    "bytes": _flip(300_000),
    "zeros": lambda packed: bytes(len(packed)),
}


@pytest.mark.parametrize("damage", _DAMAGE)
async def test_without_a_whole_tail_all_comes_from_the_network(scene: Scene, damage: str) -> None:
    scene.path.write_bytes(_DAMAGE[damage](scene.path.read_bytes()))
    assert await scene.read(START, STOP) == [(START, STOP)]


async def test_no_tail_is_no_error(scene: Scene) -> None:
    scene.path.unlink()
    assert await scene.read(START - 5, STOP) == [(START - 5, STOP)]


async def test_a_tail_that_goes_or_changes_while_it_is_used(scene: Scene) -> None:
    assert await scene.read(START, START + 10) == []
    write_tail(str(scene.path), START + 10, BLOB[START + 10 : STOP])
    assert await scene.read(START + 10, START + 20) == [(START + 10, START + 20)]
    scene.again()
    assert await scene.read(START + 10, START + 20) == []
    scene.path.unlink()
    assert await scene.read(START + 20, STOP) == [(START + 20, STOP)]


def test_what_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    write_tail(str(tmp_path / "directory"), 0, b"data")
    write_tail(str(tmp_path / "missing" / "tail"), 0, b"data")
    write_tail(str(tmp_path / "empty"), 0, b"")
    write_tail(str(tmp_path / "large"), 0, bytes(SIZE_MOST + 1))
    assert os.listdir(tmp_path) == ["directory"]


def test_the_largest_tail(tmp_path: Path) -> None:
    path = str(tmp_path / "tail")
    write_tail(path, 1 << 40, bytes(SIZE_MOST))
    tail = open_tail(path)
    assert tail is not None
    assert (tail.start, tail.stop) == (1 << 40, (1 << 40) + SIZE_MOST)
    assert read_tail(tail, tail.stop - 3, tail.stop) == bytes(3)
