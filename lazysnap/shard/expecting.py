# SPDX-License-Identifier: Apache-2.0
"""The layers that a shard is told of before any slot shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.layers.slots import LayerOrigin
from lazysnap.shard.layer_sources import Fetching
from lazysnap.shard.mounted_layers import MountedLayers

_log = log.get(__name__)
EXPECTED_SECONDS = 60.0
"""How long the first slot of a layer is waited for that is expected."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """What is fetched of a layer until a slot shows it."""

    reads: list[Any]
    shown: trio.Event = field(default_factory=trio.Event)


class Expecting:
    """Layers of a shard that are expected.

    Args:
        layers: of the shard.
        fetching: of the shard.
        nursery: where they are waited for.
        unused: told of a layer that nobody uses any more.
    """

    def __init__(
        self,
        layers: MountedLayers,
        fetching: Fetching,
        nursery: trio.Nursery,
        unused: Callable[[str, LayerReader], None],
    ) -> None:
        self._layers = layers
        self._fetching = fetching
        self._nursery = nursery
        self._unused = unused
        # By the names of indexes.
        self._waiting: dict[str, list[_Waiting]] = {}

    def expect(self, layer: LayerOrigin, reads: Sequence[Any]) -> None:
        """Begin to fetch ahead, and go on until a slot shows the layer, or none does in time.

        Args:
            layer: what is expected; its index is on disk.
            reads: as for `Fetching.prefetch`.
        """
        self._nursery.start_soon(self._expect, layer, _Waiting(list(reads)))

    async def _expect(self, layer: LayerOrigin, it: _Waiting) -> None:
        self._waiting.setdefault(layer.index, []).append(it)
        try:
            with advice(_log, "fetching a layer ahead failed", layer=layer.layer_digest):
                async with self._layers.hold(layer) as reader:
                    await self._fetching.prefetch(layer, reader, it.reads)
                    # Else its plan goes with that slot, which may be removed before there is another.
                    if self._layers.slot_of(layer.index) is None:
                        with trio.move_on_after(EXPECTED_SECONDS):
                            await it.shown.wait()
                self._unused(layer.index, reader)
        finally:
            waiting = self._waiting[layer.index]
            waiting.remove(it)
            if not waiting:
                del self._waiting[layer.index]

    def shown(self, index: str, reads: Sequence[Any]) -> bool:
        """A slot shows a layer.

        Args:
            index: name of its index.
            reads: that a profile names of it now.

        Returns:
            Whether just these were expected, so that they are being fetched.
        """
        waiting = self._waiting.get(index, ())
        for it in waiting:
            it.shown.set()
        return any(it.reads == list(reads) for it in waiting)
