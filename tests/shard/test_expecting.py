# SPDX-License-Identifier: Apache-2.0
"""Layers that a worker is told of before any slot shows them."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lazysnap.fetch.fetcher import Fetcher, Plan
from lazysnap.fetch.scheduler import Priority
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin, SlotRecord, write_slot
from lazysnap.layers.view import open_index
from lazysnap.registry import Registry
from lazysnap.shard import mounted_layers
from lazysnap.shard.expecting import EXPECTED_SECONDS
from lazysnap.shard.settings import ShardSettings
from lazysnap.shard.worker import Worker
from tests.shard.scene import Shard, shard
from tests.support import layers
from tests.support.clocks import patient_clock
from tests.support.indexes import toc_of
from tests.support.stack import wait_until

_DATA = {name: random.Random(name).randbytes(200_000) for name in ("a", "b", "c")}
_LAYER = layers.estargz([layers.file(name, data) for name, data in _DATA.items()])
_READS = [["b", 0, 200_000, 0]]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Shard]:
    with shard(tmp_path) as it:
        yield it


def _has(it: Shard, name: str) -> bool:
    digest = hashlib.sha256(_DATA[name]).hexdigest()
    return (it.root / "cache" / "objects" / digest[:2] / digest).exists()


@pytest.mark.root
@pytest.mark.fuse
def test_what_is_expected_is_fetched_before_the_layer_is_there_and_once(it: Shard) -> None:
    it.expect(_LAYER, _READS)
    wait_until(lambda: _has(it, "b"))
    requests = len(it.registry.log)
    tree = it.attach(_LAYER, _READS)
    assert (tree / "b").read_bytes() == _DATA["b"]
    assert len(it.registry.log) == requests
    assert not _has(it, "a")
    assert (tree / "a").read_bytes() == _DATA["a"]


@pytest.mark.root
@pytest.mark.fuse
def test_a_layer_that_cannot_be_expected_harms_nothing(it: Shard) -> None:
    it.expect(_LAYER, [["b", "no number", None, 0]])
    it.index_path(1).write_bytes(b"no index")
    it.call("expect", layer=_origin("index1"), reads=_READS)
    it.call("expect", layer=_origin("none"), reads=_READS)
    tree = it.attach(_LAYER)
    assert (tree / "b").read_bytes() == _DATA["b"]


def _origin(index: str) -> dict[str, Any]:
    return {
        "index": index,
        "layer_digest": _LAYER.digest,
        "reference": "registry.test/repo:tag",
        "blob_size": _LAYER.size,
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


@asynccontextmanager
async def _worker(root: Path) -> AsyncIterator[Worker]:
    """One that may serve a layer as slot 1, which is not attached."""
    async with Registry() as registry, trio.open_nursery() as nursery:
        worker = Worker(str(root), 0, ShardSettings(background=False), registry, nursery)
        Path(worker.cache.index, "i").write_bytes(encode(build(toc_of(_LAYER))))
        write_slot(str(root), SlotRecord(slot=1, shard=0, **_origin("i")))
        yield worker
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("shown", [False, True])
async def test_a_layer_is_expected_until_a_slot_shows_it_and_not_for_ever(
    tmp_path: Path, clock: trio.testing.MockClock, shown: bool
) -> None:
    async with _worker(tmp_path) as worker:
        await worker.expect(LayerOrigin(**_origin("i")))
        await trio.sleep(EXPECTED_SECONDS / 2)
        served = worker.layers.served("i")
        assert served is not None
        if shown:
            await worker.attach(1)
            await trio.sleep(1)
            assert not served.expectations
            await trio.sleep(EXPECTED_SECONDS)
            assert worker.layers.get(1).served is served  # type: ignore[union-attr]
            worker.layers.forget(1)
        await trio.sleep(EXPECTED_SECONDS)
        assert served.closed
        assert not served.expectations
        assert worker.layers._served == {}
        assert worker.layers._opening == {}


class Plans:
    """What a worker plans to fetch ahead; nothing is fetched."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Plan] = []
        monkeypatch.setattr(worker.ahead, "add", self._add)

    def _add(
        self, fetcher: Fetcher, plan: Plan, priority: Priority, *, delay_seconds: float
    ) -> None:
        self.made.append(plan)


@pytest.mark.parametrize(
    ("early", "then", "plans"),
    [
        (_READS, _READS, 1),
        ([], [], 1),
        ([], _READS, 2),  # a profile that comes while the layer is opened
        (None, _READS, 1),  # e.g. told to a worker that has died since
    ],
)
async def test_what_was_expected_is_not_planned_again_and_all_else_is(
    tmp_path: Path,
    clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    early: list[Any] | None,
    then: list[Any],
    plans: int,
) -> None:
    async with _worker(tmp_path) as worker:
        planned = Plans(worker, monkeypatch)
        if early is not None:
            await worker.expect(LayerOrigin(**_origin("i")), early)
            await trio.sleep(1)
        await worker.attach(1, then)
        await trio.sleep(1)
        assert len(planned.made) == plans


async def test_what_was_expected_and_let_go_of_is_planned_again(
    tmp_path: Path, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _worker(tmp_path) as worker:
        planned = Plans(worker, monkeypatch)
        await worker.expect(LayerOrigin(**_origin("i")), _READS)
        await trio.sleep(EXPECTED_SECONDS + 1)
        await worker.attach(1, _READS)
        await trio.sleep(1)
        await worker.detach([1], reload=True)
        await worker.attach(1, _READS)
        await trio.sleep(1)
        assert len(planned.made) == 3


async def test_a_plan_of_a_layer_that_was_let_go_of_meanwhile_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _worker(tmp_path) as worker:
        planned = Plans(worker, monkeypatch)
        await worker.attach(1, _READS)
        await worker.detach([1], reload=True)  # the plan is still being made
        served = (await worker.layers.load(1)).served
        await trio.testing.wait_all_tasks_blocked(0.5)
        assert planned.made == []
        assert worker.layers._served == {"i": served}


async def test_what_is_expected_while_its_index_is_opened_is_not_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_open = threading.Event()

    def slowly(path: str) -> LayerIndex:
        may_open.wait(60)
        return open_index(path)

    monkeypatch.setattr(mounted_layers, "open_index", slowly)
    async with _worker(tmp_path) as worker:
        planned = Plans(worker, monkeypatch)
        await worker.expect(LayerOrigin(**_origin("i")), _READS)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.attach, 1, _READS)
            await trio.testing.wait_all_tasks_blocked()
            assert worker.layers.served("i") is None
            may_open.set()
        await trio.testing.wait_all_tasks_blocked(0.5)
        assert len(planned.made) == 1


async def test_a_defect_ends_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    async with _worker(tmp_path) as worker:
        monkeypatch.setattr(worker.ahead, "add", fail)
        await worker.expect(LayerOrigin(**_origin("i")), _READS)
        await trio.testing.wait_all_tasks_blocked(0.5)
        assert "fetching a layer ahead failed" in caplog.text
        await worker.attach(1, _READS)
        await trio.testing.wait_all_tasks_blocked(0.5)
        assert "fetching ahead failed" in caplog.text
        assert worker.layers.served("i").expectations == []  # type: ignore[union-attr]
