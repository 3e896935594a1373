# SPDX-License-Identifier: Apache-2.0
"""Layers that become visible later; who makes images of trees, and who mounts them, are stand-ins."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import pytest
import trio
import trio.testing

from lazysnap.filesystem.deferred_mounts import DeferredMounts
from lazysnap.filesystem.layer_mounts import Capabilities, LayerMounts
from lazysnap.layers.layer_source import OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.layers.slots import SlotRecord
from lazysnap.snapshotter.interfaces import Attached
from lazysnap.store.records import Attachment

_OPENED = OpenedLayer("index", 100)
_RECORD = SlotRecord(
    slot=1, shard=0, layer_digest="sha256:x", index="index", reference="r", blob_size=100
)
_PLACED = Attached(7, "/final", Attachment(1, 0, "sha256:x", b""))


class Trees:
    """Of an opener: whether the image of a tree is there."""

    def __init__(self) -> None:
        self.made = trio.Event()

    def is_finished(self, opened: OpenedLayer) -> bool:
        return self.made.is_set()

    async def finished(self, opened: OpenedLayer) -> None:
        await self.made.wait()


class Mounts:
    """Where layers are visible."""

    def __init__(self) -> None:
        self.may_be_late = True
        self.at: list[str] = []
        self.fails = False
        self.goes_on = threading.Event()
        self.goes_on.set()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            any_shard=True, knows_below=True, may_be_late=self.may_be_late, tree_images=True
        )

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        self.at.append(mountpoint)

    def restore(self, attached: Sequence[Attached]) -> int:
        self.goes_on.wait(60)
        if self.fails:
            raise ValueError("a defect")
        self.at += [each.mountpoint for each in attached]
        return 0


class Bench:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.trees = Trees()
        self.mounts = Mounts()
        self.deferred = DeferredMounts(
            cast(Opener, self.trees), cast(LayerMounts, self.mounts), nursery
        )

    async def prepared(self) -> None:
        """The image of the tree is still being made when the layer gets its place."""
        await self.deferred.show(_OPENED, _RECORD, "/first")
        self.deferred.placed(_PLACED)
        await trio.testing.wait_all_tasks_blocked()
        assert self.mounts.at == []


async def test_a_layer_whose_tree_is_there_is_visible_at_once(nursery: trio.Nursery) -> None:
    it = Bench(nursery)
    it.trees.made.set()
    await it.deferred.show(_OPENED, _RECORD, "/first")
    assert it.mounts.at == ["/first"]
    it.deferred.placed(_PLACED)
    await it.deferred.settled([1])
    assert it.mounts.at == ["/first"]


async def test_a_layer_that_must_not_be_late_is_waited_for(nursery: trio.Nursery) -> None:
    it = Bench(nursery)
    it.mounts.may_be_late = False
    nursery.start_soon(it.deferred.show, _OPENED, _RECORD, "/first")
    await trio.testing.wait_all_tasks_blocked()
    assert it.mounts.at == []
    it.trees.made.set()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert it.mounts.at == ["/first"]


async def test_a_layer_becomes_visible_at_its_place_when_its_tree_is_there(
    nursery: trio.Nursery,
) -> None:
    it = Bench(nursery)
    await it.prepared()
    waited = []

    async def use() -> None:
        await it.deferred.settled([5, 1])
        waited.append(list(it.mounts.at))

    nursery.start_soon(use)
    await trio.testing.wait_all_tasks_blocked()
    assert waited == []
    it.trees.made.set()
    await it.deferred.settled([1])
    await trio.testing.wait_all_tasks_blocked()
    assert waited == [["/final"]]


@pytest.mark.parametrize("placed", [False, True])
async def test_what_is_dropped_meanwhile_never_becomes_visible(
    nursery: trio.Nursery, placed: bool
) -> None:
    it = Bench(nursery)
    await it.deferred.show(_OPENED, _RECORD, "/first")
    if placed:
        it.deferred.placed(_PLACED)
        await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(it.deferred.settled, [1])
    await trio.testing.wait_all_tasks_blocked()
    await it.deferred.drop(1)
    it.trees.made.set()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert it.mounts.at == []
    await it.deferred.settled([1])
    await it.deferred.drop(1)


async def test_who_drops_a_layer_that_is_being_mounted_waits_for_it(nursery: trio.Nursery) -> None:
    it = Bench(nursery)
    it.mounts.goes_on.clear()
    await it.prepared()
    it.trees.made.set()
    await trio.testing.wait_all_tasks_blocked()
    dropped = trio.Event()

    async def drop() -> None:
        await it.deferred.drop(1)
        assert it.mounts.at == ["/final"]  # for the caller to unmount
        dropped.set()

    nursery.start_soon(drop)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not dropped.is_set()
    it.mounts.goes_on.set()
    with trio.fail_after(60):
        await dropped.wait()


async def test_a_defect_ends_nothing(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    it = Bench(nursery)
    it.mounts.fails = True
    await it.prepared()
    it.trees.made.set()
    await it.deferred.settled([1])
    assert "layer not mounted" in caplog.text
