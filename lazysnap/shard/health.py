# SPDX-License-Identifier: Apache-2.0
"""Whether a layer's content can be had: from the cache, or if need be from its registry.

The network is asked only when the cache does not have everything and no bytes came lately. Knows no
slots and no control socket.
"""

from __future__ import annotations

import time

import trio

from lazysnap.cache import Cache
from lazysnap.errors import LazysnapError
from lazysnap.fetch.coverage import is_complete, is_empty
from lazysnap.registry.client import Blob
from lazysnap.shard.calls import Health, HealthState
from lazysnap.shard.mounted_layers import MountedLayer
from lazysnap.shard.settings import ShardSettings

# After a failed probe the next one is not tried at once: a start asks for many layers in a row.
_PROBE_FAILED_SECONDS = 5.0


class LayerHealth:
    """What was found out about the layers of a process, by the names of their indexes.

    Args:
        cache: of the process.
        settings: how long probes take, and are valid.
    """

    def __init__(self, cache: Cache, settings: ShardSettings) -> None:
        self._cache = cache
        self.settings = settings
        self._complete: dict[str, int] = {}
        self._probe_failed: dict[str, tuple[float, str]] = {}

    def forget(self, name: str) -> None:
        """Let go of a layer that is shown no more."""
        self._complete.pop(name, None)
        self._probe_failed.pop(name, None)

    async def look(self, layer: MountedLayer, blob: Blob) -> Health:
        """Find out whether a layer can be read.

        Args:
            layer: loaded.
            blob: of the layer.
        """
        name = layer.record.index
        now = time.monotonic()
        if self._complete.get(name) == self._cache.objects.generation():
            return Health(HealthState.LOCAL)
        success = blob.last_success
        if success is not None and now - success < self.settings.probe_valid_seconds:
            return Health(HealthState.REACHABLE)
        if await self.find_complete(layer):
            return Health(HealthState.LOCAL)
        problem = await self._probe(name, blob)
        if not problem:
            return Health(HealthState.REACHABLE)
        if await trio.to_thread.run_sync(is_empty, layer.index, self._cache):
            return Health(HealthState.UNREACHABLE, f"nothing of the layer is local, and {problem}")
        return Health(HealthState.DEGRADED, problem)

    async def find_complete(self, layer: MountedLayer) -> bool:
        """Look whether all content of a layer is in the cache, and remember if it is."""
        generation = self._cache.objects.generation()
        complete = await trio.to_thread.run_sync(is_complete, layer.index, self._cache)
        if complete:
            self._complete[layer.record.index] = generation
        return complete

    async def _probe(self, name: str, blob: Blob) -> str:
        """Why bytes of a layer cannot be had now; empty if they can."""
        when, problem = self._probe_failed.get(name, (0.0, ""))
        if problem and time.monotonic() - when < _PROBE_FAILED_SECONDS:
            return problem
        try:
            await blob.probe(self.settings.probe_seconds)
        except LazysnapError as error:
            self._probe_failed[name] = time.monotonic(), str(error)
            return str(error)
        self._probe_failed.pop(name, None)
        return ""
