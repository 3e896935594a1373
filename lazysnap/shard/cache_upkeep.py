# SPDX-License-Identifier: Apache-2.0
"""Seals new objects, hides those that somebody changed from the kernel, and reports those it opens.

Also keeps the cache within its limits while a process serves from it. Knows nothing of layers or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from lazysnap import log
from lazysnap.cache import Cache
from lazysnap.cache.eviction import Evictor
from lazysnap.cache.watch import ObjectWatch
from lazysnap.errors import LazysnapError
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.shard import memory

_log = log.get(__name__)
# Objects that are opened within this time are reported together.
_GATHER_SECONDS = 0.02
_LOOK_SECONDS = 2.0


def watch_objects(cache: Cache) -> ObjectWatch | None:
    """Watch the objects of a cache; None, with a warning, if the kernel does not allow that."""
    try:
        return ObjectWatch(cache.objects.root)
    except LazysnapError as error:
        _log.warning("changes of cached objects are only seen at a start", error=error)
        return None


class CacheUpkeep:
    """Looks after the objects of a cache, for one process.

    Args:
        contents: the process's table of open contents.
        seconds: time between two syncs of the cache.
        watch: of the objects; it is closed in the end.
        hold: decides which objects are held; called at each sync.
        opened: receives the keys of objects that were opened.

    Attributes:
        checked: set when all objects have been examined.
    """

    def __init__(
        self,
        contents: OpenFiles,
        seconds: float,
        watch: ObjectWatch | None,
        hold: Callable[[], object],
        opened: Callable[[Iterable[bytes]], object],
    ) -> None:
        self.checked = trio.Event()
        self._contents = contents
        self._objects = contents.cache.objects
        self._seconds = seconds
        self._watch = watch
        self._hold = hold
        self._opened = opened

    async def run(self) -> None:
        """Look after the objects for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal)
            if self._watch is not None:
                nursery.start_soon(self._follow, self._watch)
            # The watch began before this, so no change in between is missed.
            try:
                await trio.to_thread.run_sync(self._objects.recover)
            except OSError as error:
                _log.error("cache not examined", error=error)
            self.checked.set()

    async def _seal(self) -> None:
        """Sync and seal what was stored, every few seconds."""
        while True:
            await trio.sleep(self._seconds)
            self._hold()
            if self._watch is not None and self._watch.missed:
                self._watch.missed = False
                await self._examine()
            try:
                if await trio.to_thread.run_sync(self._objects.seal):
                    await trio.to_thread.run_sync(memory.give_back)
            except LazysnapError as error:
                _log.error("cache not synced", error=error)

    async def _examine(self) -> None:
        """Examine all objects, as the watch has missed changes."""
        _log.warning("changes of cached objects were missed, all are examined")
        self._objects.distrust_new()
        self._contents.close()
        try:
            await trio.to_thread.run_sync(self._objects.recover)
        except OSError as error:
            _log.error("cache not examined", error=error)

    def look(self) -> bool:
        """Process what has happened to objects until now; returns whether any was opened."""
        if self._watch is None:
            return False
        changed, opened = self._watch.take()
        for key in changed:
            _log.warning("cached object was changed, it is verified again", digest=key.hex())
            self._objects.distrust(key)
            self._contents.forget(key)
        if opened:
            self._opened(opened)
        return bool(opened)

    async def _follow(self, watch: ObjectWatch) -> None:
        """Hide objects that somebody writes to, and report those that are opened, for ever."""
        try:
            while True:
                await trio.lowlevel.wait_readable(watch.fd)
                if self.look():
                    await trio.sleep(_GATHER_SECONDS)
        finally:
            watch.close()


async def keep_within_limits(contents: OpenFiles, evictor: Evictor) -> None:
    """Evict beyond the limits, and close contents that any process has evicted; for ever.

    Storing checks the limits itself. This is for what other programs do with the disk.

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
