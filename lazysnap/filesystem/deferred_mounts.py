# SPDX-License-Identifier: Apache-2.0
"""Makes layers visible while containerd goes on, if the images of their trees are still being made.

The image of a large tree takes as long as all that containerd does between two layers, and a layer is only
looked into when something is put on it, which waits. A crash leaves a layer that is not visible, which is
mended like any other: at the next start, and by each check before a use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from lazysnap import log
from lazysnap.filesystem.layer_mounts import LayerMounts
from lazysnap.layers.opener import OpenedLayer, Opener
from lazysnap.layers.slots import SlotRecord
from lazysnap.snapshotter.interfaces import Attached

_log = log.get(__name__)


@dataclass(slots=True, eq=False)
class _Hidden:
    """A layer that is not visible yet."""

    opened: OpenedLayer
    begun: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class DeferredMounts:
    """Layers that become visible later.

    Args:
        opener: of the layers.
        layer_mounts: makes them visible.
        nursery: where that is waited for.
    """

    def __init__(self, opener: Opener, layer_mounts: LayerMounts, nursery: trio.Nursery) -> None:
        self._opener = opener
        self._layer_mounts = layer_mounts
        self._nursery = nursery
        self._hidden: dict[int, _Hidden] = {}

    async def show(self, opened: OpenedLayer, record: SlotRecord, mountpoint: str) -> None:
        """Make a layer visible, or note that `placed` has to.

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
        """The directory of a layer has the name that it keeps: have the layer become visible there."""
        hidden = self._hidden.get(attached.attachment.slot)
        if hidden is not None:
            hidden.begun = True
            self._nursery.start_soon(self._reveal, hidden, attached)

    async def _reveal(self, hidden: _Hidden, attached: Attached) -> None:
        try:
            with hidden.scope:
                await self._opener.finished(hidden.opened)
                await trio.to_thread.run_sync(self._layer_mounts.restore, [attached])
        except Exception:  # a defect must not end the daemon; the next check finds what is missing
            _log.exception("layer not mounted", slot=attached.attachment.slot)
        finally:
            self._hidden.pop(attached.attachment.slot, None)
            hidden.done.set()

    async def settled(self, slots: Iterable[int]) -> None:
        """Wait until those of these slots that are becoming visible are, or cannot be."""
        for slot in slots:
            hidden = self._hidden.get(slot)
            if hidden is not None:
                await hidden.done.wait()

    async def drop(self, slot: int) -> None:
        """A slot is given up: returns when its layer will not become visible any more."""
        hidden = self._hidden.pop(slot, None)
        if hidden is not None:
            hidden.scope.cancel()
            if hidden.begun:
                await hidden.done.wait()
            hidden.done.set()
