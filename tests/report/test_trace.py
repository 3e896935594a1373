# SPDX-License-Identifier: Apache-2.0
"""The trace against what the source was really asked for."""

from __future__ import annotations

import random
from pathlib import Path

import msgpack
import msgspec
import pytest
import trio
import trio.testing

from lazysnap.errors import LazysnapError, RegistryUnreachable
from lazysnap.fetch import trace
from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.scheduler import Priority, Scheduler
from lazysnap.fetch.trace import Told
from lazysnap.prefetch.queue import PrefetchQueue
from tests.fetch.engine import engine
from tests.support import layers

_DATA = random.Random(7).randbytes(6_000_000)
LAYER = layers.estargz([layers.file("f", _DATA)], chunk_size=50_000)


async def _at_rest(noted: trace.Trace) -> None:
    """Until no request is under way: a reader has his answer before the request has ended."""
    with trio.fail_after(120):
        while any(each.ended is None for each in noted.events(0)[0]):
            await trio.sleep(0.01)


async def test_every_request_is_noted_with_what_came(tmp_path: Path) -> None:
    async with engine(LAYER, tmp_path) as e:
        for offset in (0, 3_000_000, 5_900_000):
            await e.read("f", offset, 10_000)
        for _ in range(3):
            await e.read("f", 0, 10_000)  # is there
        noted = e.reader.fetcher.requests.trace
        await _at_rest(noted)
        fetched, waited = noted.events(0)
        assert [(each.begin, each.end - each.begin) for each in fetched] == e.source.requests
        assert sum(each.received for each in fetched) == sum(n for _, n in e.source.requests)
        assert {(each.priority, each.urgent, each.failed) for each in fetched} == {(0, 0, False)}
        assert [(each.offset, each.size) for each in waited] == [
            (0, 10_000),
            (3_000_000, 10_000),
            (5_900_000, 10_000),
        ]
        assert not any(each.ahead for each in waited)
        for request, read in zip(fetched, waited, strict=True):
            assert e.index.member(request.first).blob_offset == request.begin
            assert e.index.member(request.last).blob_end == request.end
            assert request.ended is not None
            assert read.began <= request.began <= request.ended
        assert e.reader.fetcher.requests.trace.events(fetched[1].began)[0] == fetched[1:]


async def test_a_reader_who_comes_before_the_prefetch_makes_it_urgent(tmp_path: Path) -> None:
    async with engine(LAYER, tmp_path) as e, trio.open_nursery() as nursery:
        e.source.gate = trio.Event()
        fetcher = e.reader.fetcher
        ahead = PrefetchQueue(Scheduler(), nursery)
        done = ahead.add(fetcher, Plan(range(5)), Priority.PREFETCH)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as readers:
            readers.start_soon(e.read, "f", 0, 10)
            await trio.testing.wait_all_tasks_blocked()
            (under_way,), nobody = fetcher.requests.trace.events(0)
            assert (under_way.ended, nobody) == (None, [])
            e.source.gate.set()
        await done.wait()
        (request,), (read,) = fetcher.requests.trace.events(0)
        assert (request.priority, request.urgent) == (Priority.PREFETCH, Priority.DEMAND)
        assert read.ahead
        nursery.cancel_scope.cancel()


async def test_what_failed_is_noted(tmp_path: Path) -> None:
    def broken(data: bytes) -> bytes:
        raise RegistryUnreachable("no answer")

    async with engine(LAYER, tmp_path) as e:
        e.source.script.append(broken)
        with pytest.raises(LazysnapError):
            await e.read("f", 0, 10)
        await _at_rest(e.reader.fetcher.requests.trace)
        (request,), (read,) = e.reader.fetcher.requests.trace.events(0)
        assert (request.failed, request.received) == (True, 0)
        assert read.seconds >= 0


async def test_the_oldest_are_forgotten(tmp_path: Path) -> None:
    most, before = trace._ring.events.maxlen or 0, trace.forgotten()
    mine = trace.Trace()
    for number in range(most + 10):
        with mine.waiting(1, number, 1, ahead=False):
            pass
    _, waited = mine.events(0)
    assert [each.offset for each in waited] == list(range(10, most + 10))
    assert trace.forgotten() >= before + 10


def test_what_is_told_survives_the_socket() -> None:
    fetched = trace.Fetched(1.5, None, 0, 3, 10, 90, 1, 0, 5)
    waited = trace.Waited(1.0, 0.5, 7, 0, 4096, ahead=True)
    mine = Told(slot=4, fetched=[fetched], waited=[waited], started=0.5, now=9.0)
    packed = msgpack.packb([msgspec.to_builtins(mine)])
    assert msgspec.convert(msgpack.unpackb(packed), list[Told]) == [mine]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert([{"slot": "four"}], list[Told])
    assert [trace.label(number) for number in (0, 1, 2, 9)] == [
        *("demand", "prefetch", "background"),
        "9",
    ]
