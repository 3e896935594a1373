# SPDX-License-Identifier: Apache-2.0
"""Fetches the libraries of programs that are read (see `lazysnap.prefetch.libraries`), over all shards.

The layers of an image may be on several shards. Each shard follows the files of its own layers and calls
`link` of the others for the files that they have. This is only advice: failures are logged at level debug.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.errors import LazysnapError
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import SlotRecord, list_slots, read_slot, slots_changed
from lazysnap.layers.view import open_index
from lazysnap.paths import Root
from lazysnap.prefetch.libraries import BytesAhead, Image, Libraries, may_link
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.shard.client import connect
from lazysnap.shard.mounted_layers import MountedLayers
from lazysnap.shard.served_layer import ServedLayer

_log = log.get(__name__)
_CALL_SECONDS = 5.0


class LibraryPrefetch:
    """Follows the files of a shard.

    Args:
        layers: of the shard; this is told of each file whose beginning is read.
        ahead: fetches what is needed.
        nursery: where files are followed.
    """

    def __init__(self, layers: MountedLayers, ahead: PrefetchQueue, nursery: trio.Nursery) -> None:
        self._layers = layers
        layers.begun = self.begun
        self._ahead = ahead
        self._nursery = nursery
        self._images: dict[int, Libraries] = {}
        self._changed = 0
        self._looking = trio.Lock()

    def begun(self, layer: ServedLayer, node: int) -> None:
        """Follow a file whose beginning is read, if it was not and may be a program or a library.

        Args:
            layer: of the file; nothing is followed before a slot shows it.
            node: of the file.
        """
        if node not in layer.followed and layer.slots and may_link(layer.index, node):
            layer.followed.add(node)
            self._nursery.start_soon(self._follow, layer.slots[0], node)

    async def link(self, slot: int, node: int) -> None:
        """Begin to fetch what loading a file reads, and what the file links to.

        Args:
            slot: of this shard.
            node: of the file.

        Raises:
            LazysnapError: the slot cannot be used.
        """
        layer = await self._layers.load(slot)
        followed = layer.served.followed
        if node not in followed:
            followed.add(node)
            self._nursery.start_soon(self._follow, slot, node)

    async def _follow(self, slot: int, node: int) -> None:
        with advice(_log, "following a file failed", slot=slot, node=node):
            libraries = await self._image(slot)
            layer = await self._layers.load(slot)
            await libraries.follow(slot, node, BytesAhead(layer.reader, self._ahead))

    async def _image(self, slot: int) -> Libraries:
        """The image that a slot belongs to: if there are several, the one with the newest top slot.

        Raises:
            LazysnapError: a layer of it cannot be used.
        """
        async with self._looking:
            changed = slots_changed(self._layers.root)
            if changed != self._changed:
                self._changed = changed
                self._images.clear()
            if slot not in self._images:
                chain = await trio.to_thread.run_sync(_chain, self._layers.root, slot)
                indexes = [await self._index(record) for record in chain]
                image = Image([record.slot for record in chain], indexes)
                shards = {record.slot: record.shard for record in chain}
                libraries = Libraries(image, lambda s, n: self._want(shards, s, n))
                self._images |= dict.fromkeys(shards, libraries)
            return self._images[slot]

    async def _index(self, record: SlotRecord) -> LayerIndex:
        if record.shard == self._layers.shard:
            return (await self._layers.load(record.slot)).index
        path = Root(self._layers.root).cache.index(record.index)
        return await trio.to_thread.run_sync(open_index, path)

    def _want(self, shards: Mapping[int, int], slot: int, node: int) -> None:
        self._nursery.start_soon(self._link, shards[slot], slot, node)

    async def _link(self, shard: int, slot: int, node: int) -> None:
        """`link` of the shard that has the slot."""
        try:
            if shard == self._layers.shard:
                await self.link(slot, node)
            else:
                path = Root(self._layers.root).shard_socket(shard)
                await connect(path, timeout=_CALL_SECONDS).link(slot, node)
        except LazysnapError as error:
            _log.debug("file is not linked", slot=slot, node=node, error=error)


def _chain(root: str, slot: int) -> list[SlotRecord]:
    """In a thread: the records of the newest image that a slot belongs to, the uppermost first."""
    for number in sorted(list_slots(root), reverse=True):
        record = read_slot(root, number)
        if number == slot or slot in record.below:
            return [record, *(read_slot(root, below) for below in record.below)]
    return [read_slot(root, slot)]
