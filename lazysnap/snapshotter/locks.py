# SPDX-License-Identifier: Apache-2.0
"""Decides who may work when: locks by key, and one thread at a time for the database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar, TypeVarTuple, Unpack

import trio

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class KeyLocks:
    """Locks by key: work on one key is done one after the other, work on different keys at once.

    There are as many locks as keys in use; a key that no task holds or waits for costs nothing.
    """

    def __init__(self) -> None:
        self._locks: dict[str, trio.Lock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, *keys: str) -> AsyncIterator[None]:
        """Wait until no other task holds any of these keys, and hold them in the body.

        Two holders of several keys cannot block each other, as all take them in one order. For this a
        holder must not ask for more keys of the same set of locks.
        """
        async with AsyncExitStack() as stack:
            for key in sorted(set(keys)):
                await stack.enter_async_context(self._hold_one(key))
            yield

    @asynccontextmanager
    async def _hold_one(self, key: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            # No other task can have taken it since, as there is no checkpoint between.
            if not lock.locked() and self._locks.get(key) is lock:
                del self._locks[key]


class DatabaseThread:
    """Runs the functions that use the database: one at a time, in the order of the calls.

    SQLite's connection may change threads, but must not be used by two at once.
    """

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, function: Callable[[Unpack[Arguments]], T], *args: *Arguments) -> T:
        """Run a function when its turn comes; once it has begun, it is not interrupted."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)
