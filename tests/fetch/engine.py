# SPDX-License-Identifier: Apache-2.0
"""A reader over a blob in memory that misbehaves as told, for tests of the engine.

async with engine(layer, tmp_path) as e:
    assert await e.read("/file", 10, 100) == data[10:110]
    e.source.requests            # ranges that were asked for
    e.source.script.append(...)  # what goes wrong with the next one
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from lazysnap.cache import Cache
from lazysnap.fetch.byte_source import ByteSource, Counters
from lazysnap.fetch.fetcher import Fetcher
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.requests import Requests
from lazysnap.fetch.scheduler import Scheduler
from lazysnap.index.reader import LayerIndex
from tests.support.indexes import index_of, resolve
from tests.support.layers import Layer

Fault = Callable[[bytes], bytes]
"""Gets the bytes that were asked for and returns what is sent instead, or raises."""


class MemorySource:
    """A `ByteSource`.

    Attributes:
        requests: each (start, length), in order.
        script: faults, each for one request.
        always: a fault for every request.
        gate: what each request waits for before its first byte, if set.
        piece: how many bytes come at once.
    """

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.requests: list[tuple[int, int]] = []
        self.script: list[Fault] = []
        self.always: Fault | None = None
        self.gate: trio.Event | None = None
        self.piece = 50_000

    @asynccontextmanager
    async def read_stream(self, start: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        assert 0 <= start < start + length <= len(self.blob)
        self.requests.append((start, length))
        fault = self.always or (self.script.pop(0) if self.script else None)
        yield _Stream(self, self.blob[start : start + length], fault)

    def times_fetched(self) -> int:
        """How often the byte was fetched that was fetched most often."""
        edges = sorted(
            [(start, 1) for start, _ in self.requests] + [(s + n, -1) for s, n in self.requests],
            key=lambda edge: (edge[0], edge[1]),
        )
        most = now = 0
        for _, change in edges:
            now += change
            most = max(most, now)
        return most


class _Stream:
    """The body of an answer."""

    def __init__(self, source: MemorySource, data: bytes, fault: Fault | None) -> None:
        self._source = source
        self._data = data
        self._fault = fault
        self._at = 0

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._source.gate is not None:
            await self._source.gate.wait()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            self._data = fault(self._data)
        piece = self._data[self._at : self._at + self._source.piece]
        self._at += len(piece)
        if not piece:
            raise StopAsyncIteration
        return piece


def make_fetcher(
    index: LayerIndex,
    source: ByteSource,
    contents: OpenFiles,
    nursery: trio.Nursery,
    *,
    counters: Counters | None = None,
    scheduler: Scheduler | None = None,
    decoders: trio.CapacityLimiter | None = None,
    host: str = "host",
    name: str = "layer",
) -> Fetcher:
    """A fetcher with all that it needs."""
    scheduler = scheduler or Scheduler()
    requests = Requests(
        index,
        source,
        counters or Counters(),
        contents=contents,
        nursery=nursery,
        decoders=decoders or trio.CapacityLimiter(2),
        scheduler=scheduler,
        host=host,
        name=name,
    )
    return Fetcher(index, requests, scheduler)


class Engine:
    """What `engine` yields."""

    def __init__(
        self, index: LayerIndex, source: MemorySource, contents: OpenFiles, nursery: trio.Nursery
    ) -> None:
        self.index = index
        self.source = source
        self.contents = contents
        fetcher = make_fetcher(index, source, contents, nursery)
        self.reader = LayerReader(index, contents, fetcher)

    def node(self, path: str) -> int:
        found = resolve(self.index, path)
        assert found >= 0
        return found

    async def read(self, path: str, offset: int = 0, size: int = 1 << 30) -> bytes:
        """As the FUSE handler reads."""
        node = self.node(path)
        data = self.reader.read_nowait(node, offset, size)
        return bytes(await self.reader.read(node, offset, size) if data is None else data)


@asynccontextmanager
async def engine(
    layer: Layer, directory: Path, *, open_limit: int = 100, contents: OpenFiles | None = None
) -> AsyncIterator[Engine]:
    """A reader of a layer.

    Args:
        layer: what is read.
        directory: of the cache; a second engine on it is like a second process.
        open_limit: how many contents may be open.
        contents: share those of another engine, as layers of one process do.
    """
    mine = contents or OpenFiles(Cache(str(directory)), open_limit)
    async with trio.open_nursery() as nursery:
        try:
            yield Engine(index_of(layer), MemorySource(layer.blob), mine, nursery)
            nursery.cancel_scope.cancel()
        finally:
            if contents is None:
                mine.close()
