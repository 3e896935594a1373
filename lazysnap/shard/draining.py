# SPDX-License-Identifier: Apache-2.0
"""Fetches all of some layers now, because somebody asked for that.

Readers go first, as always. Knows no control socket.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.scheduler import Priority
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.shard.mounted_layers import MountedLayers


class Draining:
    """The layers of a process that are being fetched to the end.

    Args:
        layers: of the process.
        ahead: works through what is asked for here, after what profiles name.
    """

    def __init__(self, layers: MountedLayers, ahead: PrefetchQueue) -> None:
        self._layers = layers
        self._ahead = ahead
        self._under_way: dict[str, trio.Event] = {}

    async def drain(self, slots: Iterable[int]) -> None:
        """Begin, or go on, to fetch all that is missing of these slots.

        What was fetched and evicted meanwhile is fetched anew by the next call.

        Args:
            slots: that have a record on disk.

        Raises:
            LazysnapError: a layer cannot be loaded.
        """
        for slot in slots:
            layer = await self._layers.load(slot)
            known = self._under_way.get(layer.record.index)
            if known is None or known.is_set():
                plan = Plan(range(layer.index.member_count))
                fetcher = layer.reader.fetcher
                self._under_way[layer.record.index] = self._ahead.add(
                    fetcher, plan, Priority.PREFETCH
                )

    def forget(self, index: str) -> None:
        """Let go of a layer that is shown no more; its plan is dropped with it."""
        self._under_way.pop(index, None)
