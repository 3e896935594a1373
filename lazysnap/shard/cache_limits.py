# SPDX-License-Identifier: Apache-2.0
"""Keeps the cache within its limits while a process serves from it."""

from __future__ import annotations

import trio

from lazysnap.cache.eviction import Evictor
from lazysnap.fetch.open_files import OpenFiles

_LOOK_SECONDS = 2.0


async def keep_within_limits(contents: OpenFiles, evictor: Evictor) -> None:
    """Look at the limits, and let go of what was evicted by whichever process; for ever.

    What is stored is looked at when it is stored. This is for what others do with the disk.

    Args:
        contents: the process's table of open contents.
        evictor: of the cache that they are in.
    """
    generation = contents.cache.objects.generation()
    while True:
        await trio.to_thread.run_sync(evictor.look)
        now = contents.cache.objects.generation()
        if now != generation:
            generation = now
            contents.sweep()
        await trio.sleep(_LOOK_SECONDS)
