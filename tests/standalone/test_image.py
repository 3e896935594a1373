# SPDX-License-Identifier: Apache-2.0
"""How layers that are there are found."""

from __future__ import annotations

import threading
from pathlib import Path

import trio
import trio.testing

from lazysnap.labels import SNAPSHOT_REF
from lazysnap.overlay import Kind
from lazysnap.snapshotter import Snapshotter
from lazysnap.standalone.image import committed
from lazysnap.store.snapshots import SnapshotStore

_SECONDS = 120


async def test_a_layer_is_found_while_the_snapshotter_uses_its_database(tmp_path: Path) -> None:
    store = SnapshotStore(str(tmp_path / "metadata.db"))
    begun, end = threading.Event(), threading.Event()

    def change() -> None:
        with store.creating(Kind.ACTIVE, "other"):
            begun.set()
            assert end.wait(_SECONDS)

    found: list[str | None] = []
    async with trio.open_nursery() as nursery:
        snapshotter = Snapshotter(str(tmp_path), store)
        await snapshotter.start(nursery)
        await snapshotter.prepare("key")
        await snapshotter.commit("name", "key", {SNAPSHOT_REF: "sha256:chain"})

        async def look() -> None:
            for chain_id, parent in (("sha256:chain", ""), ("sha256:chain", "name"), ("other", "")):
                found.append(await committed(snapshotter, {SNAPSHOT_REF: chain_id}, parent))

        async with trio.open_nursery() as both:
            both.start_soon(snapshotter._db_thread.run, change)
            assert await trio.to_thread.run_sync(begun.wait, _SECONDS)
            both.start_soon(look)
            try:
                await trio.testing.wait_all_tasks_blocked(0.05)
            finally:
                end.set()
        await snapshotter.aclose()
    store.close()
    assert found == ["name", None, None]
