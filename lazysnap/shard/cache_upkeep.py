# SPDX-License-Identifier: Apache-2.0
"""Seals new objects, takes away from the kernel what somebody changed, and tells what it opens.

Also keeps the cache within its limits while a process serves from it.

Knows nothing of layers or requests.
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
# What is opened meanwhile is told together.
_GATHER_SECONDS = 0.02
_LOOK_SECONDS = 2.0


def watch_objects(cache: Cache) -> ObjectWatch | None:
    """Watch the objects of a cache; None, with a warning, if the kernel does not allow that."""
    try:
        return ObjectWatch(cache.objects.root)
    except LazysnapError as error:
        _log.warning("changes of cached objects are only seen at a start", error=error)
        return None


class Settling:
    """Looks after the objects of a cache, for one process.

    Args:
        contents: the process's table of open contents.
        seconds: time between two syncs of the cache.
        watch: of the objects; it is closed in the end.
        hold: decides which objects are held; called every so many seconds.
        opened: told the keys of objects that were opened.

    Attributes:
        checked: set when all objects were looked at.
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
        """Do it, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._seal)
            if self._watch is not None:
                nursery.start_soon(self._follow, self._watch)
            # The watch has begun before, so that no change is missed in between.
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
        """Look at all objects, as some may have been changed unnoticed."""
        _log.warning("changes of cached objects were missed, all are looked at")
        self._objects.distrust_new()
        self._contents.close()
        try:
            await trio.to_thread.run_sync(self._objects.recover)
        except OSError as error:
            _log.error("cache not examined", error=error)

    def look(self) -> bool:
        """Follow what has happened to objects until now; returns whether any was opened."""
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
        """Take away objects that somebody writes to, and tell of those that are opened."""
        try:
            while True:
                await trio.lowlevel.wait_readable(watch.fd)
                if self.look():
                    await trio.sleep(_GATHER_SECONDS)
        finally:
            watch.close()


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
