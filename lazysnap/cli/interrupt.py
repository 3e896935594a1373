# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM for commands that must clean up: the work is cancelled, then the exit code set.

Python's KeyboardInterrupt would appear anywhere, also within the cleaning up; here a signal becomes
a cancellation of trio, which our cleaning up is shielded from.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run asynchronous work to its end.

    Args:
        work: called within a trio run.

    Raises:
        SystemExit: SIGINT or SIGTERM came; the work was cancelled and has cleaned up.
    """
    return trio.run(_guarded, work)


async def _guarded(work: Callable[[], Awaitable[T]]) -> T:
    received: list[int] = []
    outcome: list[T] = []
    failure: Exception | None = None
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for number in signals:
                    received.append(number)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                outcome.append(await work())
            except Exception as error:  # raised outside, where it is not wrapped into a group
                failure = error
            nursery.cancel_scope.cancel()
    if received:
        raise SystemExit(128 + received[0])
    if failure is not None:
        raise failure
    return outcome[0]
