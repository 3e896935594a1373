# SPDX-License-Identifier: Apache-2.0
"""Tells systemd that the daemon works, for as long as it does (sd_watchdog_enabled(3), WatchdogSec=).

It is the event loop that sends each ping, and only after the database has answered. A daemon that
hangs in either is so replaced, which no container notices.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping

import sdnotify
import trio

from lazysnap import log
from lazysnap.errors import LazysnapError

_log = log.get(__name__)
# Half of the time is what systemd advises; a busy machine may take the rest.
_SHARE = 1 / 3


def period(environment: Mapping[str, str]) -> float | None:
    """How often systemd wants to hear from us.

    Args:
        environment: has $WATCHDOG_USEC and $WATCHDOG_PID if the service has a watchdog.

    Returns:
        Seconds from one ping to the next; None if nobody waits for pings of this process.
    """
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds * _SHARE / 1_000_000 if microseconds > 0 else None


async def run(answers: Callable[[], Awaitable[None]]) -> None:
    """Ping until cancelled, or return at once if nobody waits for it.

    Args:
        answers: returns when the database has answered. While it waits or raises a LazysnapError,
            there is no ping.
    """
    seconds = period(os.environ)
    if seconds is None:
        return
    systemd = sdnotify.SystemdNotifier()
    try:
        while True:
            try:
                await answers()
                systemd.notify("WATCHDOG=1")
            except LazysnapError as error:
                _log.error("the daemon does not work, the watchdog will restart it", error=error)
            await trio.sleep(seconds)
    finally:
        if systemd.socket is not None:
            systemd.socket.close()
