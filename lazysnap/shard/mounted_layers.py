# SPDX-License-Identifier: Apache-2.0
"""The layers that a shard serves, by slot; loaded from disk when they are first asked for.

Two slots of the same layer share one `ServedLayer`, which may be there before any slot. It is closed when
the last slot is forgotten and nobody expects another. Knows nothing of FUSE.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from lazysnap.errors import Internal
from lazysnap.index.model import Attributes
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin, SlotRecord, list_slots, read_slot
from lazysnap.layers.view import LayerView, open_index
from lazysnap.owners import Owners, possible_owners
from lazysnap.paths import Root
from lazysnap.prefetch.recorder import Recorder
from lazysnap.shard.served_layer import Expectation, ServedLayer

_TIDY_SECONDS = 10.0
Begun = Callable[[ServedLayer, int], None]
"""Told of a layer and the node of a file whose beginning is read."""
MakeLayer = Callable[[LayerOrigin, LayerIndex, Begun], ServedLayer]


class MountedLayer(LayerView):
    """A layer as one slot shows it, with its bytes.

    Args:
        record: what the slot serves.
        served: the layer, shared by all slots that show it.
    """

    def __init__(self, record: SlotRecord, served: ServedLayer) -> None:
        super().__init__(record, served.index)
        self.served = served
        self.reader = served.reader
        self.recorder: Recorder | None = None
        # by time.monotonic()
        self.last_read: float | None = None
        self.base = record.slot << 32 | 1


class OwnedLayer(MountedLayer):
    """A layer where not all users and groups are there that its files belong to.

    Args:
        record: as above.
        served: as above.
        owners: those that are there.
    """

    def __init__(self, record: SlotRecord, served: ServedLayer, owners: Owners) -> None:
        super().__init__(record, served)
        self._owners = owners

    def attributes(self, node: int) -> Attributes:
        """Attributes of a node, with an owner that is there."""
        attributes = super().attributes(node)
        uid, gid = self._owners.of(attributes.uid, attributes.gid)
        return attributes._replace(uid=uid, gid=gid)


class MountedLayers:
    """All layers of a shard.

    Args:
        root: lazysnap's root directory.
        shard: number of this shard; slots of others are refused.
        make: makes a layer that is not served yet.

    Attributes:
        begun: told of each file whose beginning is read; replaced by whoever wants to know.
    """

    def __init__(self, root: str, shard: int, make: MakeLayer) -> None:
        self.root = root
        self.shard = shard
        self.begun: Begun = lambda layer, node: None
        self._make = make
        self._owners = possible_owners()
        self._by_slot: dict[int, MountedLayer] = {}
        # By the names of indexes.
        self._served: dict[str, ServedLayer] = {}
        self._opening: dict[str, trio.Lock] = {}

    def get(self, slot: int) -> MountedLayer | None:
        """The layer of a slot, if it is loaded."""
        return self._by_slot.get(slot)

    def slots(self) -> list[int]:
        """The slots of this shard that have a record on disk."""
        return list_slots(self.root)

    def slots_loaded(self) -> list[int]:
        """The slots that are loaded."""
        return list(self._by_slot)

    async def load(self, slot: int) -> MountedLayer:
        """The layer of a slot, loaded now if it is not yet.

        Raises:
            NotFound: nothing is attached to the slot.
            Internal: its record or its index cannot be used.
        """
        found = self._by_slot.get(slot)
        if found is not None:
            return found
        record = read_slot(self.root, slot)
        if record.shard != self.shard:
            raise Internal(f"slot {slot} belongs to shard {record.shard}")
        served = await self._serve(record)
        # Somebody else may have loaded the slot meanwhile.
        found = self._by_slot.get(slot)
        if found is None:
            if self._owners is None:
                found = MountedLayer(record, served)
            else:
                found = OwnedLayer(record, served, self._owners)
            self._by_slot[slot] = found
            served.slots.append(slot)
        else:
            self._close_unused(served)  # the record may have named another layer then
        return found

    async def _serve(self, origin: LayerOrigin) -> ServedLayer:
        """The one `ServedLayer` of a layer.

        The caller has to give it a slot or an expectation before its next checkpoint.
        """
        found = self._served.get(origin.index)
        if found is not None:
            return found
        lock = self._opening.setdefault(origin.index, trio.Lock())
        try:
            async with lock:
                if origin.index not in self._served:
                    path = Root(self.root).cache.index(origin.index)
                    index = await trio.to_thread.run_sync(open_index, path)
                    if index.blob_size != origin.blob_size:
                        raise Internal(
                            f"index {path} is of a blob of {index.blob_size} bytes,"
                            f" and not of {origin.blob_size}",
                            reason="index-damaged",
                        )
                    made = self._make(origin, index, self.begun)
                    self._served[origin.index] = made
                return self._served[origin.index]
        finally:
            if not lock.locked():  # else it was handed on to a task that waited for it
                self._opening.pop(origin.index, None)

    @asynccontextmanager
    async def expecting(
        self, origin: LayerOrigin, expectation: Expectation
    ) -> AsyncIterator[ServedLayer]:
        """Keep a layer in the body, though no slot may show it yet.

        Args:
            origin: of the layer.
            expectation: what is fetched of it.

        Raises:
            Internal: the index cannot be used.
        """
        layer = await self._serve(origin)
        layer.expectations.append(expectation)
        try:
            yield layer
        finally:
            layer.expectations.remove(expectation)
            self._close_unused(layer)

    def forget(self, slot: int) -> None:
        """Let go of a slot, and of its layer when nobody else uses it."""
        gone = self._by_slot.pop(slot, None)
        if gone is not None:
            gone.served.slots.remove(slot)
            self._close_unused(gone.served)

    def _close_unused(self, layer: ServedLayer) -> None:
        if not layer.slots and not layer.expectations:
            del self._served[layer.origin.index]
            layer.close()

    def served(self, index: str) -> ServedLayer | None:
        """The layer with this index, if a loaded slot shows it or somebody expects it."""
        return self._served.get(index)

    async def tidy(self) -> None:
        """Every few seconds, give back the memory into which indexes were read; for ever."""
        while True:
            await trio.sleep(_TIDY_SECONDS)
            for layer in self._served.values():
                layer.index.give_back()
