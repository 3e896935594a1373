# SPDX-License-Identifier: Apache-2.0
"""What the kernel has asked this process for lately. Knows nothing of layers or FUSE."""

from __future__ import annotations

from lazysnap.metrics import families
from lazysnap.metrics.counts import counts


class Activity:
    """What the kernel has asked for lately.

    Attributes:
        last: when the last request came, by time.monotonic().
        waiting: when each read came that waits for the disk or the network now.
        read_bytes: how many were read, in a list of one.
    """

    __slots__ = ("last", "read_bytes", "waiting")

    def __init__(self) -> None:
        self.last = float("-inf")
        self.waiting: dict[object, float] = {}
        self.read_bytes = counts.counter(families.READ_BYTES)


activity = Activity()
"""Of this process, which serves one mount and no other."""
