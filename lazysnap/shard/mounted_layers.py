# SPDX-License-Identifier: Apache-2.0
"""The layers that a shard serves, by slot; loaded from disk when they are first asked for.

Two slots of the same layer share its index and its reader, which may be there before any slot. Knows
nothing of FUSE.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from lazysnap.errors import Internal
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.index.model import Attributes
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin, SlotRecord, list_slots, read_slot
from lazysnap.layers.view import LayerView, open_index
from lazysnap.owners import Owners, possible_owners
from lazysnap.paths import Root
from lazysnap.prefetch.recorder import Recorder

_TIDY_SECONDS = 10.0


class MountedLayer(LayerView):
    """A layer as one slot shows it, with its bytes.

    Args:
        record: what the slot serves.
        reader: reads the layer's files; shared by all slots of the layer.
    """

    def __init__(self, record: SlotRecord, reader: LayerReader) -> None:
        super().__init__(record, reader.index)
        self.reader = reader
        self.recorder: Recorder | None = None
        # by time.monotonic()
        self.last_read: float | None = None
        self.base = record.slot << 32 | 1


class OwnedLayer(MountedLayer):
    """A layer where not all users and groups are there that its files belong to.

    Args:
        record: as above.
        reader: as above.
        owners: those that are there.
    """

    def __init__(self, record: SlotRecord, reader: LayerReader, owners: Owners) -> None:
        super().__init__(record, reader)
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
        make_reader: makes the reader of a layer that is seen for the first time.
    """

    def __init__(
        self, root: str, shard: int, make_reader: Callable[[LayerOrigin, LayerIndex], LayerReader]
    ) -> None:
        self.root = root
        self.shard = shard
        self._make_reader = make_reader
        self._owners = possible_owners()
        self._by_slot: dict[int, MountedLayer] = {}
        self._readers: dict[str, LayerReader] = {}
        self._held: Counter[str] = Counter()
        self._loading: dict[int, trio.Lock] = {}

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
        lock = self._loading.setdefault(slot, trio.Lock())
        try:
            async with lock:
                if slot not in self._by_slot:
                    self._by_slot[slot] = await self._load(slot)
                return self._by_slot[slot]
        finally:
            if not lock.statistics().tasks_waiting:
                self._loading.pop(slot, None)

    async def _load(self, slot: int) -> MountedLayer:
        record = read_slot(self.root, slot)
        if record.shard != self.shard:
            raise Internal(f"slot {slot} belongs to shard {record.shard}")
        reader = await self._reader(record)
        if self._owners is not None:
            return OwnedLayer(record, reader, self._owners)
        return MountedLayer(record, reader)

    async def _reader(self, origin: LayerOrigin) -> LayerReader:
        """The one reader of a layer."""
        reader = self._readers.get(origin.index)
        if reader is None:
            path = Root(self.root).cache.index(origin.index)
            index = await trio.to_thread.run_sync(open_index, path)
            # Somebody else may have got one meanwhile.
            reader = self._readers.get(origin.index)
            if reader is None:
                reader = self._readers[origin.index] = self._make_reader(origin, index)
        return reader

    @asynccontextmanager
    async def hold(self, origin: LayerOrigin) -> AsyncIterator[LayerReader]:
        """Keep the reader of a layer, though no slot may show the layer yet.

        Args:
            origin: of the layer. If its `index` is not used afterwards, the reader is gone.

        Raises:
            Internal: the index cannot be used.
        """
        self._held[origin.index] += 1
        try:
            yield await self._reader(origin)
        finally:
            self._held -= Counter([origin.index])
            self._drop_unused(origin.index)

    def forget(self, slot: int) -> None:
        """Let go of a slot, and of its layer when nobody else uses it."""
        gone = self._by_slot.pop(slot, None)
        if gone is not None:
            self._drop_unused(gone.record.index)

    def _drop_unused(self, index: str) -> None:
        if not self.uses(index):
            self._readers.pop(index, None)

    def uses(self, index: str) -> bool:
        """Whether the reader of the layer with this index is kept, for a loaded slot or by `hold`."""
        return self._held[index] > 0 or self.slot_of(index) is not None

    def slot_of(self, index: str) -> int | None:
        """A loaded slot that shows the layer with this index, if there is one."""
        of_index = (s for s, layer in self._by_slot.items() if layer.record.index == index)
        return next(of_index, None)

    async def tidy(self) -> None:
        """Every few seconds, give back the memory into which indexes were read; for ever."""
        while True:
            await trio.sleep(_TIDY_SECONDS)
            for reader in self._readers.values():
                reader.index.give_back()
