# SPDX-License-Identifier: Apache-2.0
"""The layers that a shard is told of before any slot shows them."""

from __future__ import annotations

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.cache import Cache
from lazysnap.layers.slots import LayerOrigin
from lazysnap.shard.calls import PackedReads
from lazysnap.shard.layer_sources import prefetch
from lazysnap.shard.mounted_layers import MountedLayers
from lazysnap.shard.served_layer import Expectation, ServedLayer

_log = log.get(__name__)
EXPECTED_SECONDS = 60.0
"""How long an expected layer is kept without a slot that shows it."""


async def expect(
    layers: MountedLayers, cache: Cache, origin: LayerOrigin, reads: PackedReads
) -> None:
    """Fetch ahead of a layer, and keep it until a slot shows it, or none does in time.

    Args:
        layers: of the shard.
        cache: of the process.
        origin: of the layer that is expected; its index is on disk.
        reads: as for `prefetch`.
    """
    expectation = Expectation(list(reads))
    with advice(_log, "fetching a layer ahead failed", layer=origin.layer_digest):
        async with layers.expecting(origin, expectation) as layer:
            await prefetch(layer, cache, expectation.reads)
            # With a slot, its plan goes when that slot goes, which may be before there is another.
            if not layer.slots:
                with trio.move_on_after(EXPECTED_SECONDS):
                    await expectation.shown.wait()


def shown(layer: ServedLayer, reads: PackedReads) -> bool:
    """Tell those who expect a layer that a slot shows it.

    Args:
        layer: that is shown.
        reads: that a profile names of it now.

    Returns:
        Whether the same reads were expected, so that they are being fetched.
    """
    for expectation in layer.expectations:
        expectation.shown.set()
    return any(each.reads == list(reads) for each in layer.expectations)
