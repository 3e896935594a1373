# SPDX-License-Identifier: Apache-2.0
"""Notes what is read of the layers of a shard while a start is watched, for a profile.

Meanwhile new objects are kept out of the kernel's sight, as what it reads by itself tells nobody.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import pyfuse3
import trio

from lazysnap.cache import Cache
from lazysnap.errors import FailedPrecondition
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.members import of_file
from lazysnap.layers.recorder import Recorder
from lazysnap.layers.recorder import reads as reads_of
from lazysnap.shard.mounted import MountedLayer, MountedLayers


class Recording:
    """Starts that are watched.

    Args:
        layers: of the shard.
        cache: whose objects are kept out of sight.
        nursery: where they are moved into its sight again.
    """

    def __init__(self, layers: MountedLayers, cache: Cache, nursery: trio.Nursery) -> None:
        self._layers = layers
        self._objects = cache.objects
        self._nursery = nursery
        # Sessions that somebody wants to the end, whatever is read.
        self._wanted: set[float] = set()

    async def record(self, slots: Sequence[int], since: float, fresh: bool = False) -> None:
        """Begin to note what is read.

        Args:
            slots: of the image.
            since: when the start began, by the machine's monotonic clock.
            fresh: have the kernel forget what it has, as reading that would not be seen.
        """
        if fresh:
            self._wanted.add(since)
        for slot in slots:
            layer = await self._layers.load(slot)
            if layer.recorder is None:
                place = partial(_place, layer.index)
                layer.recorder = Recorder(place, partial(self._walked, layer))
            layer.recorder.begin(since)
            self._objects.holding = True
            if fresh:
                await trio.to_thread.run_sync(self._drop_pages, layer)

    async def recorded(self, slots: Sequence[int], since: float) -> dict[str, list[Any]]:
        """End `record`; what was read, by layer digest.

        Args:
            slots: of the image.
            since: as it was given to `record`.

        Raises:
            FailedPrecondition: some of the slots were not recorded to the end.
        """
        self._wanted.discard(since)
        found: dict[str, list[Any]] = {}
        lost = False
        for slot in slots:
            layer = self._layers.get(slot)
            recorder = None if layer is None else layer.recorder
            notes = None if recorder is None else recorder.end(since)
            if layer is None or recorder is None or notes is None:
                lost = True
                continue
            if recorder.idle:
                layer.recorder = None
            joined = await trio.to_thread.run_sync(reads_of, layer.index, notes, since)
            found.setdefault(layer.record.layer_digest, []).extend(msgspec.to_builtins(joined))
        await self._release()
        if lost:
            raise FailedPrecondition("the worker was replaced, or a layer removed, while recording")
        return found

    def under_way(self) -> bool:
        """Whether a start may be going on that is watched."""
        return any(recorder.worthwhile for recorder in self._recorders())

    def _walked(self, layer: MountedLayer) -> None:
        """End watching, as somebody reads all of some part of a layer: what starts does not do that.

        Then the kernel shall open files by itself, which is several times faster.
        """
        if layer.recorder is None:
            return
        over = layer.recorder.sessions - self._wanted
        for recorder in self._recorders():
            recorder.give_up(over)
        self._nursery.start_soon(self._release)

    def _recorders(self) -> list[Recorder]:
        layers = (self._layers.get(slot) for slot in self._layers.slots_loaded())
        recorders = (layer.recorder for layer in layers if layer is not None)
        return [recorder for recorder in recorders if recorder is not None]

    async def _release(self) -> None:
        """Let the kernel see what was kept from it, if nothing is watched any more."""
        self._objects.holding = self.under_way()
        await trio.to_thread.run_sync(self._objects.release)

    def _drop_pages(self, layer: MountedLayer) -> None:
        """In a thread, as the kernel may wait for requests that the event loop answers."""
        index = layer.index
        for node in range(index.node_count):
            attributes = index.attributes(node)
            if stat.S_ISREG(attributes.mode) and attributes.size:
                self._objects.withdraw(index.file(node).object_key)
                # ENOENT: the kernel does not know the inode
                with contextlib.suppress(OSError):
                    pyfuse3.invalidate_inode(layer.base + node)


def _place(index: LayerIndex, node: int) -> int:
    """The first member that a file is in."""
    return next(of_file(index, node), 0)
