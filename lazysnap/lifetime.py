# SPDX-License-Identifier: Apache-2.0
"""How daemons end: at a signal, or by an error that the command line knows what to say of."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import sdnotify
import trio

from lazysnap import log
from lazysnap.errors import LazysnapError

_log = log.get(__name__)


async def stop_at(signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
    """Tell systemd at the first signal, and cancel a nursery.

    Args:
        signals: as they are received.
        nursery: of all that the daemon does.
    """
    async for number in signals:
        _log.info("stopping", signal=signal.Signals(number).name)
        break
    sdnotify.SystemdNotifier().notify("STOPPING=1")
    nursery.cancel_scope.cancel()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the error of ours that a group holds, if it holds nothing else, instead of the group."""
    try:
        yield
    except ExceptionGroup as group:
        error: Exception = group
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, LazysnapError):
            raise error from group
        raise
