# SPDX-License-Identifier: Apache-2.0
"""Turns for what waits for a host: a few at a time, and for one host not all of them.

A host that is slow, or wants to be, then only holds up what waits for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio


@dataclass
class _Host:
    limit: trio.CapacityLimiter
    users: int = 0


class HostTurns:
    """Gives out turns.

    Args:
        each: how many one host can have at a time.
        total: how many all hosts together can have.
    """

    def __init__(self, each: int, total: int) -> None:
        self._each = each
        self._total = trio.CapacityLimiter(total)
        self._hosts: dict[str, _Host] = {}

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it in the body.

        Args:
            host: that will be asked.
        """
        found = self._hosts.setdefault(host, _Host(trio.CapacityLimiter(self._each)))
        found.users += 1
        try:
            async with found.limit, self._total:
                yield
        finally:
            found.users -= 1
            if not found.users:
                del self._hosts[host]
