# SPDX-License-Identifier: Apache-2.0
"""When layers of the store are made and removed; who makes and mounts them are stand-ins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, NotFound
from lazysnap.layers.store_names import NamedLayer, list_names
from lazysnap.layerstore.images import Images
from lazysnap.layerstore.kernel_trees import KernelTrees
from lazysnap.layerstore.layers import LayerStore
from lazysnap.layerstore.references import References
from lazysnap.layerstore.storages import Storages
from lazysnap.reference import Reference
from lazysnap.snapshotter.snapshotter import Snapshotter
from lazysnap.store.records import Attachment

_NAME = "registry.test/image:1"
_LAYER = oci.Descriptor(
    media_type="application/vnd.oci.image.layer.v1.tar+gzip", digest=Digest.of(b"layer"), size=100
)
_DIGEST = "".join(_LAYER.digest)  # msgspec encodes no subclasses of str


class Snapshots:
    """Makes a lazy snapshot of each layer at once."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.made = 0

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> None:
        await trio.lowlevel.checkpoint()
        self.made += 1
        self.slots[f"{labels['key']}@0"] = self.made
        raise AlreadyExists("it is there")

    async def attachment(self, name: str) -> Attachment | None:
        await trio.lowlevel.checkpoint()
        return Attachment(self.slots[name], 0, _DIGEST, b"")

    async def remove(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.slots.pop(name, None) is None:
            raise NotFound(name)


class OneImage:
    async def find(self, reference: Reference, digest: str) -> tuple[Any, int]:
        await trio.lowlevel.checkpoint()
        image = SimpleNamespace(
            manifest=SimpleNamespace(layers=[_LAYER]),
            config=SimpleNamespace(diff_ids=[str(Digest.of(b"diff"))]),
            layer_labels=lambda number, key: {"key": key},
        )
        return image, 0


class Trees:
    """Looks paths of layers up, as the kernel does when something is mounted there."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.looking = trio.Event()
        self.go_on = trio.Event()
        self.store: LayerStore | None = None

    def missing(self, layers: Iterable[NamedLayer]) -> list[NamedLayer]:
        return list(layers)

    def show(self, name: NamedLayer) -> None:
        trio.from_thread.run(self._look_up, name)

    async def _look_up(self, name: NamedLayer) -> None:
        self.looking.set()
        await self.go_on.wait()
        assert self.store is not None
        if name.slot not in list_names(self.root):  # a shard asks only for what it does not know
            await self.store.find(name.reference, name.digest)

    def hide(self, name: NamedLayer) -> None:
        pass


async def test_our_own_look_at_a_path_makes_no_layer_again(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    (tmp_path / "names").mkdir()
    snapshots, trees = Snapshots(), Trees(str(tmp_path))
    references = References(Storages(str(tmp_path)), nursery, lambda: None)
    store = trees.store = LayerStore(
        str(tmp_path),
        cast(Snapshotter, snapshots),
        cast(Images, OneImage()),
        references,
        cast(KernelTrees, trees),
    )
    slot = await store.find(_NAME, _DIGEST)
    await store.released(slot, 0)
    nursery.start_soon(store.show_trees)
    await trees.looking.wait()
    removed: list[int] = []

    async def collect() -> None:
        removed.append(await store.collect())

    nursery.start_soon(collect)
    await trio.testing.wait_all_tasks_blocked(0.2)
    assert (removed, snapshots.made) == ([], 1)
    trees.go_on.set()
    with trio.fail_after(60):
        while not removed:
            await trio.sleep(0.01)
    assert removed == [1]
    assert (snapshots.slots, snapshots.made) == ({}, 1)
    nursery.cancel_scope.cancel()
