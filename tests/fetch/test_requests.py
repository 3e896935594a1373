# SPDX-License-Identifier: Apache-2.0
"""Fetching of one layer over a slow source, in the time of trio's mock clock."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lazysnap.cache import Cache
from lazysnap.errors import DigestMismatch, LazysnapError, RegistryUnreachable
from lazysnap.fetch import requests as module
from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.requests import Flight
from lazysnap.fetch.scheduler import Limits, Priority, Scheduler
from lazysnap.index.reader import LayerIndex
from tests.fetch.engine import make_fetcher
from tests.support.clocks import patient_clock
from tests.support.indexes import index_of, resolve
from tests.support.layers import LayerEntry, estargz, file

_LATENCY = 0.03
_PIECE = 128 << 10


@dataclass
class Request:
    """One request; moments in virtual time."""

    start: int
    end: int
    began: float
    ended: float = float("inf")


@dataclass
class SlowSource:
    """A `ByteSource` with a round trip time and a bandwidth."""

    blob: bytes
    latency: float = _LATENCY
    bandwidth: float = 50e6
    requests: list[Request] = field(default_factory=list)
    errors: list[LazysnapError] = field(default_factory=list)

    @asynccontextmanager
    async def read_stream(self, start: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        request = Request(start, start + length, trio.current_time())
        self.requests.append(request)

        async def pieces() -> AsyncIterator[bytes]:
            await trio.sleep(self.latency)
            if self.errors:
                raise self.errors.pop(0)
            for at in range(start, start + length, _PIECE):
                piece = self.blob[at : min(at + _PIECE, start + length)]
                await trio.sleep(len(piece) / self.bandwidth)
                yield piece

        stream = pieces()
        try:
            yield stream
        finally:
            await stream.aclose()
            request.ended = trio.current_time()

    def overlapping(self) -> int:
        """Bytes that were fetched more than once."""
        seen: set[int] = set()
        total = 0
        for request in self.requests:
            units = set(range(request.start, request.end))
            total += len(units & seen)
            seen |= units
        return total


class Layer:
    """A layer, its source, and what reads it."""

    def __init__(
        self,
        entries: Sequence[LayerEntry],
        directory: Path,
        nursery: trio.Nursery,
        *,
        chunk_size: int = 64 << 10,
        min_chunk_size: int = 0,
        limits: Limits | None = None,
    ) -> None:
        made = estargz(entries, chunk_size=chunk_size, min_chunk_size=min_chunk_size)
        self.index: LayerIndex = index_of(made)
        self.source = SlowSource(made.blob)
        self.scheduler = Scheduler(limits)
        self.contents = OpenFiles(Cache(str(directory)))
        self.fetcher = make_fetcher(
            self.index, self.source, self.contents, nursery, scheduler=self.scheduler, host="h"
        )
        self.reader = LayerReader(self.index, self.contents, self.fetcher)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        node = resolve(self.index, path)
        data = self.reader.read_nowait(node, offset, size)
        return bytes(await self.reader.read(node, offset, size) if data is None else data)

    async def ahead(self, plan: Plan, priority: Priority = Priority.PREFETCH) -> None:
        """One request of a plan."""
        async with self.scheduler.ticket("h", priority) as ticket:
            await self.fetcher.fetch_ahead(plan, ticket)

    async def all_ahead(self, plan: Plan) -> None:
        while not plan.ended:
            await self.ahead(plan)

    async def landed(self, flights: Sequence[Flight]) -> None:
        for flight in flights:
            await flight.landed.wait()


def _data(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """Decoding and storing take no virtual time."""
    return patient_clock(monkeypatch)


async def test_a_sequential_reader_finds_the_next_request_under_way(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    data = _data(8 << 20)
    layer = Layer([file("big", data)], tmp_path, nursery)
    step = 128 << 10
    wanted: list[tuple[int, float]] = []
    for offset in range(0, len(data), step):
        wanted.append((offset + step, trio.current_time()))
        assert await layer.read("big", offset, step) == data[offset : offset + step]
        await trio.sleep(0.005)  # works on it: 26 MB/s
    requests = layer.source.requests
    assert 4 < len(requests) < 12
    # Once it is known to be sequential, each request is under way before its bytes are wanted.
    # (Random bytes do not compress, so offsets in the file are those in the blob.)
    for request in requests[2:]:
        assert request.began < next(when for end, when in wanted if end > request.start)
    assert layer.source.overlapping() == 0


async def test_random_reads_keep_the_window_small(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    data = _data(24 << 20)
    layer = Layer([file("big", data)], tmp_path, nursery)
    offsets = random.Random(7).sample(range(0, len(data), 1 << 20), 8)
    for offset in offsets:
        assert await layer.read("big", offset, 4096) == data[offset : offset + 4096]
    assert all(r.end - r.start <= (2 << 20) + (128 << 10) for r in layer.source.requests)
    assert sum(r.end - r.start for r in layer.source.requests[:2]) < 1 << 20  # nothing is known yet
    assert layer.source.overlapping() == 0


async def test_a_reader_boosts_what_prefetch_is_bringing_and_does_not_fetch_it_twice(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    data = _data(1 << 20)
    layer = Layer([file("f", data)], tmp_path, nursery)
    nursery.start_soon(layer.ahead, Plan(range(layer.index.member_count)))
    await trio.sleep(_LATENCY / 2)
    (ticket,) = layer.scheduler.host("h").active
    assert ticket.priority == Priority.PREFETCH
    assert await layer.read("f", 0, 100) == data[:100]
    assert ticket.priority == Priority.DEMAND
    assert layer.source.overlapping() == 0
    assert len(layer.source.requests) == 1


async def test_decoding_what_nobody_waits_for_leaves_a_thread_to_readers(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 64 << 10
    data = _data(40 * chunk)
    layer = Layer([file("f", data)], tmp_path, nursery, chunk_size=chunk)
    layer.scheduler.leisure.total_tokens = 1
    began, go_on = trio.Event(), threading.Event()
    ahead: list[int] = []
    decode = module._decode

    def slowly(index: LayerIndex, members: Sequence[int], *rest: Any, **named: Any) -> Any:
        if members[0] < 24:
            ahead.append(members[0])
            trio.from_thread.run_sync(began.set)
            go_on.wait(30)
        return decode(index, members, *rest, **named)

    monkeypatch.setattr(module, "_decode", slowly)
    async with trio.open_nursery() as plans:
        plans.start_soon(layer.ahead, Plan(range(4)))
        plans.start_soon(layer.ahead, Plan(range(20, 24)))
        await began.wait()
        try:
            assert await layer.read("f", 35 * chunk, 100) == data[35 * chunk : 35 * chunk + 100]
            assert len(ahead) == 1
        finally:
            go_on.set()
    assert all(map(layer.fetcher.present, [*range(4), *range(20, 24)]))


async def test_whoever_asks_first_no_member_is_fetched_twice(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    entries = [file(f"f{n}", _data(200_000, n)) for n in range(20)]
    layer = Layer(entries, tmp_path, nursery)
    chance = random.Random(3)

    async def reader() -> None:
        for _ in range(15):
            entry = chance.choice(entries)
            offset = chance.randrange(200_000)
            expected = entry.data[offset : offset + 50_000]
            assert await layer.read(entry.path, offset, 50_000) == expected
            await trio.sleep(chance.random() * 0.02)

    async with trio.open_nursery() as readers:
        for _ in range(4):
            readers.start_soon(reader)
        members = list(range(layer.index.member_count))
        readers.start_soon(layer.all_ahead, Plan(members))
        readers.start_soon(layer.all_ahead, Plan(chance.sample(members, len(members))))
    await trio.sleep(1)
    assert layer.source.overlapping() == 0
    assert all(map(layer.fetcher.present, range(layer.index.member_count)))


async def test_a_wrong_member_spoils_no_other(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    entries = [file(f"f{n}", _data(20_000, n)) for n in range(12)]
    layer = Layer(entries, tmp_path, nursery)
    chunk = layer.index.chunk(layer.index.file(resolve(layer.index, "f5")).first_chunk)
    member = layer.index.member(chunk.member)
    blob = bytearray(layer.source.blob)
    blob[(member.blob_offset + member.blob_end) // 2] ^= 0xFF
    layer.source.blob = bytes(blob)
    plan = Plan(range(layer.index.member_count))
    await layer.all_ahead(plan)  # ends, though one cannot be had
    missing = [n for n in range(layer.index.member_count) if not layer.fetcher.present(n)]
    assert missing == [chunk.member]
    for entry in entries:
        if entry.path != "f5":
            assert await layer.read(entry.path, 0, 20_000) == entry.data
    with pytest.raises((DigestMismatch, LazysnapError)):
        await layer.read("f5", 0, 20_000)


async def test_a_readers_neighbours_do_not_fail_with_it(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    entries = [file(f"f{n}", _data(20_000, n)) for n in range(8)]
    layer = Layer(entries, tmp_path, nursery)
    chunk = layer.index.chunk(layer.index.file(resolve(layer.index, "f2")).first_chunk)
    blob = bytearray(layer.source.blob)
    blob[layer.index.member(chunk.member).blob_offset + 5000] ^= 0xFF
    layer.source.blob = bytes(blob)
    results: dict[str, bool] = {}

    async def read(entry: LayerEntry) -> None:
        try:
            results[entry.path] = await layer.read(entry.path, 0, 20_000) == entry.data
        except LazysnapError:
            results[entry.path] = False

    async with trio.open_nursery() as readers:
        for entry in entries:
            readers.start_soon(read, entry)
    assert results == {entry.path: entry.path != "f2" for entry in entries}


async def test_a_failed_request_leaves_the_plan_where_it_was(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    layer = Layer([file("f", _data(300_000))], tmp_path, nursery)
    layer.source.errors.append(RegistryUnreachable("away"))
    plan = Plan(range(layer.index.member_count))
    with pytest.raises(RegistryUnreachable):
        await layer.ahead(plan)
    assert plan.position == 0
    await layer.all_ahead(plan)
    assert all(map(layer.fetcher.present, range(layer.index.member_count)))


async def test_a_plan_goes_back_to_what_somebody_else_failed_to_bring(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    layer = Layer([file("f", _data(100_000)), file("g", _data(400_000))], tmp_path, nursery)
    layer.source.errors.append(RegistryUnreachable("away"))
    flights = layer.fetcher.fetch([0])
    plan = Plan([0])
    await layer.ahead(plan)
    assert plan.ended
    assert len(layer.source.requests) <= 1  # it relies on the reader's
    with pytest.raises(RegistryUnreachable):
        await layer.fetcher.settle(plan)
    assert plan.position == 0
    assert flights[0].error is not None
    await layer.all_ahead(plan)
    await layer.fetcher.settle(plan)
    assert layer.fetcher.present(0)


async def test_looking_at_what_is_there_creates_nothing_and_is_bounded(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    layer = Layer([file("big", _data(2 << 20))], tmp_path, nursery, chunk_size=1024)
    partial = tmp_path / "partial"
    before = sorted(partial.iterdir())
    assert not any(map(layer.fetcher.present, range(layer.index.member_count)))
    assert sorted(partial.iterdir()) == before
    await layer.all_ahead(Plan(range(layer.index.member_count)))
    again = Plan(range(layer.index.member_count))
    requests = len(layer.source.requests)
    await layer.ahead(again)
    assert 0 < again.position <= 512 < layer.index.member_count
    await layer.all_ahead(again)
    assert len(layer.source.requests) == requests


async def test_members_of_many_chunks_are_looked_at_one_by_one(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    entries = [file(f"f{n:04}", b"%d" % n) for n in range(6000)]
    layer = Layer(entries, tmp_path, nursery, min_chunk_size=800_000)
    index = layer.index
    assert 700 < index.member(1).chunk_count < 1200
    await layer.all_ahead(Plan(range(index.member_count)))
    again = Plan(range(index.member_count))
    await layer.ahead(again)
    assert 1 <= again.position <= 3
    await layer.all_ahead(again)


async def test_a_request_for_many_small_files_looks_at_a_bounded_number(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    entries = [file(f"f{n:04}", b"%d" % n) for n in range(1500)]
    layer = Layer(entries, tmp_path, nursery)
    await layer.read("f0000", 0, 10)
    assert len(layer.source.requests) == 1
    there = sum(map(layer.fetcher.present, range(layer.index.member_count)))
    assert 100 < there <= 512
