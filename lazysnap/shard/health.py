# SPDX-License-Identifier: Apache-2.0
"""Finds out whether all content of a layer can be read: from the cache, or from its registry.

It asks the registry only if the cache lacks something and no bytes came lately. Knows no slots and no
control socket.
"""

from __future__ import annotations

import time

import trio

from lazysnap.cache import Cache
from lazysnap.errors import LazysnapError
from lazysnap.fetch.coverage import is_complete, is_empty
from lazysnap.shard.calls import Health, HealthState
from lazysnap.shard.served_layer import FailedProbe, ServedLayer
from lazysnap.shard.settings import ShardSettings

# A failed probe counts for so long, as a start asks for many layers in a row.
_PROBE_FAILED_SECONDS = 5.0


class LayerHealth:
    """Finds out about the layers of a process.

    Args:
        cache: of the process.
        settings: how long probes take, and are valid.

    Attributes:
        settings: as above; may be replaced.
    """

    def __init__(self, cache: Cache, settings: ShardSettings) -> None:
        self._cache = cache
        self.settings = settings

    async def look(self, layer: ServedLayer) -> Health:
        """Find out whether a layer can be read."""
        now = time.monotonic()
        if layer.complete_at == self._cache.objects.generation():
            return Health(HealthState.LOCAL)
        success = layer.blob.last_success
        if success is not None and now - success < self.settings.probe_valid_seconds:
            return Health(HealthState.REACHABLE)
        if await self.find_complete(layer):
            return Health(HealthState.LOCAL)
        problem = await self._probe(layer)
        if not problem:
            return Health(HealthState.REACHABLE)
        if await trio.to_thread.run_sync(is_empty, layer.index, self._cache):
            return Health(HealthState.UNREACHABLE, f"nothing of the layer is local, and {problem}")
        return Health(HealthState.DEGRADED, problem)

    async def find_complete(self, layer: ServedLayer) -> bool:
        """Look whether all content of a layer is in the cache, and remember it if so."""
        generation = self._cache.objects.generation()
        complete = await trio.to_thread.run_sync(is_complete, layer.index, self._cache)
        if complete:
            layer.complete_at = generation
        return complete

    async def _probe(self, layer: ServedLayer) -> str:
        """Why bytes of a layer cannot be had now; empty if they can."""
        failed = layer.failed_probe
        if failed is not None and time.monotonic() - failed.at < _PROBE_FAILED_SECONDS:
            return failed.problem
        try:
            await layer.blob.probe(self.settings.probe_seconds)
        except LazysnapError as error:
            layer.failed_probe = FailedProbe(time.monotonic(), str(error))
            return str(error)
        layer.failed_probe = None
        return ""
