# SPDX-License-Identifier: Apache-2.0
"""Virtual time for tests of code that works in threads, or with sockets and processes, too.

@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)

Time must pass in some tests that talk to a real server or process. They take `jumping_clock` instead,
whose time is the real one until the test says ``clock.jump(seconds)``: so they neither wait, nor
depend on how much of a short time a busy machine needs for something else.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
import trio.testing


def jumping_clock() -> trio.testing.MockClock:
    """A clock that goes at the pace of the real one and that a test can put forward."""
    return trio.testing.MockClock(rate=1.0)


def patient_clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """A clock that jumps when all tasks sleep, and never while a thread works.

    To trio a task that waits for a thread is one that sleeps. A threshold of some milliseconds lets the
    thread come first only as long as the machine has time for it.

    Args:
        monkeypatch: of the test; `trio.to_thread.run_sync` is followed until its end.
    """
    clock = trio.testing.MockClock(autojump_threshold=0.0)
    run_sync = trio.to_thread.run_sync
    threads = 0

    async def followed(*arguments: Any, **options: Any) -> Any:
        nonlocal threads
        threads += 1
        clock.autojump_threshold = math.inf
        try:
            return await run_sync(*arguments, **options)
        finally:
            threads -= 1
            if not threads:
                clock.autojump_threshold = 0.0

    monkeypatch.setattr(trio.to_thread, "run_sync", followed)
    return clock
