# SPDX-License-Identifier: Apache-2.0
"""Bounds the threads of a process by what they do, so that no kind of work takes those of another.

Trio's own bound of threads is one for all, and whatever is slow, or is made slow by an image, would
take all of them: nobody could read then. So nothing that a reader waits for runs in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import trio

_READS = 40
_CHECKS = 4
LARGE = 64 << 20
"""Contents of more bytes than this are large, see `Threads`."""

ELSEWHERE = trio.CapacityLimiter(math.inf)
"""For threads that something else bounds already."""


def _limiter(count: int) -> trio.CapacityLimiter:
    return trio.CapacityLimiter(count)


@dataclass(frozen=True)
class Threads:
    """The threads of a process.

    Attributes:
        reads: that read for a reader from what is known to be right.
        checks: that compare what an earlier process has stored with its digest, for a reader: chunks,
            and contents that are not large.
        large_checks: that do so with large contents.
        promotions: that make complete partial files objects. Nobody waits for these.
    """

    reads: trio.CapacityLimiter = field(default_factory=lambda: _limiter(_READS))
    checks: trio.CapacityLimiter = field(default_factory=lambda: _limiter(_CHECKS))
    large_checks: trio.CapacityLimiter = field(default_factory=lambda: _limiter(1))
    promotions: trio.CapacityLimiter = field(default_factory=lambda: _limiter(1))
