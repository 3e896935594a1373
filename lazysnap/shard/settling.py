# SPDX-License-Identifier: Apache-2.0
"""Seals new objects, and takes away from the kernel what it shall not read by itself.

That is what somebody changed; and while a start is watched all that is new, as what the start reads is to
be noted, and the kernel tells nobody. Knows nothing of layers or requests.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from lazysnap import log
from lazysnap.cache.watch import ObjectWatch
from lazysnap.errors import LazysnapError
from lazysnap.layers.contents import Contents
from lazysnap.shard import memory

_log = log.get(__name__)


class Settling:
    """Looks after the objects of a cache, for one process.

    Args:
        contents: the process's table of open contents.
        seconds: time between two syncs of the cache.
        watched: whether a start is being watched now.

    Attributes:
        checked: set when all objects were looked at.
    """

    def __init__(self, contents: Contents, seconds: float, watched: Callable[[], bool]) -> None:
        self.checked = trio.Event()
        self._contents = contents
        self._objects = contents.cache.objects
        self._seconds = seconds
        self._watched = watched

    async def run(self) -> None:
        """Do it, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal)
            try:
                watch = ObjectWatch(self._objects.root)
            except LazysnapError as error:
                _log.warning("changes of cached objects are only seen at a start", error=error)
            else:
                nursery.start_soon(self._follow, watch)
            # After the watch has begun, so that no change is missed in between.
            try:
                await trio.to_thread.run_sync(self._objects.recover)
            except OSError as error:
                _log.error("cache not examined", error=error)
            self.checked.set()

    async def _seal(self) -> None:
        """Sync and seal what was stored, every few seconds."""
        while True:
            await trio.sleep(self._seconds)
            self._objects.holding = self._watched()
            try:
                if await trio.to_thread.run_sync(self._objects.seal):
                    await trio.to_thread.run_sync(memory.give_back)
            except LazysnapError as error:
                _log.error("cache not synced", error=error)

    async def _follow(self, watch: ObjectWatch) -> None:
        """Take away objects that somebody writes to."""
        try:
            while True:
                await trio.lowlevel.wait_readable(watch.fd)
                for key in watch.changed():
                    _log.warning(
                        "cached object was changed, it is verified again", digest=key.hex()
                    )
                    self._objects.demote(key)
                    self._contents.forget(key)
        finally:
            watch.close()
