# SPDX-License-Identifier: Apache-2.0
"""Mounts layers while containerd goes on, if the images of their trees are still being built.

Building the image of a large tree takes as long as all that containerd does between two layers, and a layer
is only looked into when something is put on top of it, which waits. A crash leaves a layer that is not
visible; it is mounted like any other that is missing: at the next start, and by each check before a use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.filesystem.layer_mounts import LayerMounts
from lazysnap.layers.layer_source import OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.layers.slots import SlotRecord
from lazysnap.snapshotter.interfaces import Attached

_log = log.get(__name__)


@dataclass(slots=True, eq=False)
class _Hidden:
    """A layer that is not visible yet, as the image of its tree is still being built."""

    opened: OpenedLayer
    begun: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class DeferredMounts:
    """Mounts layers as soon as they are complete.

    Args:
        opener: of the layers; knows when they are complete.
        layer_mounts: mounts them.
        nursery: where the tasks run that wait for a layer.
    """

    def __init__(self, opener: Opener, layer_mounts: LayerMounts, nursery: trio.Nursery) -> None:
        self._opener = opener
        self._layer_mounts = layer_mounts
        self._nursery = nursery
        self._hidden: dict[int, _Hidden] = {}

    async def show(self, opened: OpenedLayer, record: SlotRecord, mountpoint: str) -> None:
        """Make a layer visible, or leave that to `placed` if its tree's image is still being built.

        Args:
            opened: the layer.
            record: of its slot, which is attached.
            mountpoint: an existing directory.

        Raises:
            Internal: the kernel refused.
        """
        if not self._layer_mounts.capabilities.may_be_late:
            await self._opener.finished(opened)
        if self._opener.is_finished(opened):
            await trio.to_thread.run_sync(self._layer_mounts.show, record, mountpoint)
        else:
            self._hidden[record.slot] = _Hidden(opened)

    def placed(self, attached: Attached) -> None:
        """The directory of a layer has its final name: begin to make the layer visible there."""
        hidden = self._hidden.get(attached.attachment.slot)
        if hidden is not None:
            hidden.begun = True
            self._nursery.start_soon(self._mount_later, hidden, attached)

    async def _mount_later(self, hidden: _Hidden, attached: Attached) -> None:
        slot = attached.attachment.slot
        try:
            # A layer that is not mounted here is mounted by the next check.
            with advice(_log, "layer not mounted", level=logging.ERROR, slot=slot), hidden.scope:
                await self._opener.finished(hidden.opened)
                await trio.to_thread.run_sync(self._layer_mounts.restore, [attached])
        finally:
            self._hidden.pop(slot, None)
            hidden.done.set()

    async def settled(self, slots: Iterable[int]) -> None:
        """Wait until no mount of these slots is outstanding, be it that it was made or that it failed."""
        for slot in slots:
            hidden = self._hidden.get(slot)
            if hidden is not None:
                await hidden.done.wait()

    async def drop(self, slot: int) -> None:
        """Give up a slot; returns when its layer can no longer become visible."""
        hidden = self._hidden.pop(slot, None)
        if hidden is not None:
            hidden.scope.cancel()
            if hidden.begun:
                await hidden.done.wait()
            hidden.done.set()
