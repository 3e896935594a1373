# SPDX-License-Identifier: Apache-2.0
"""Decides when background fetching may go on: while no reader is active and the cache is not full.

Decompression takes the same process as all requests, even those that the cache answers. A full cache
would evict something, which somebody has used, for each thing that nobody has asked for.
"""

from __future__ import annotations

import time

import trio

from lazysnap import log
from lazysnap.cache.eviction import Evictor
from lazysnap.shard.activity import activity

_log = log.get(__name__)
# The background waits until the kernel makes no request for so long, but not longer than the second.
_QUIET_SECONDS = 0.5
_QUIET_MOST_SECONDS = 3.0
# The cache counts as full for so long after an eviction by any process.
_FULL_SECONDS = 600.0
_LOOK_SECONDS = 5.0


class IdleTime:
    """Tells background fetching when it may go on.

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
