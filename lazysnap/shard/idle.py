# SPDX-License-Identifier: Apache-2.0
"""When the background may fetch: not beside readers, and not what would only push out other things.

Decompressing shares the process with all requests, also those that the cache answers. And a cache at
its limit would evict something for each thing that nobody has asked for.
"""

from __future__ import annotations

import time

import trio

from lazysnap import log
from lazysnap.cache.eviction import Evictor
from lazysnap.shard.activity import activity

_log = log.get(__name__)
# The background waits for such a pause between requests of the kernel, but only so long.
_QUIET_SECONDS = 0.5
_QUIET_MOST_SECONDS = 3.0
# For so long after an eviction, by whichever process, the cache counts as full.
_FULL_SECONDS = 600.0
_LOOK_SECONDS = 5.0


class Leisure:
    """Tells the background when to go on.

    Args:
        evictor: of the cache.
    """

    def __init__(self, evictor: Evictor) -> None:
        self._evictor = evictor
        self._waiting = False

    async def wait(self) -> None:
        """Wait until the background may make its next request."""
        while await trio.to_thread.run_sync(self._evictor.seconds_since_eviction) < _FULL_SECONDS:
            if not self._waiting:
                self._waiting = True
                _log.info("the cache is full, nothing is fetched in the background")
            await trio.sleep(_LOOK_SECONDS)
        self._waiting = False
        with trio.move_on_after(_QUIET_MOST_SECONDS):
            while time.monotonic() - activity.last < _QUIET_SECONDS:
                await trio.sleep(_QUIET_SECONDS / 4)
