# SPDX-License-Identifier: Apache-2.0
"""What a client of registries has sent and received. Counts nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HostStatistics:
    """What went to and came from one host since the start.

    Attributes:
        requests: answered or not.
        bytes_received: of bodies.
        retries: requests that repeat a failed one.
    """

    requests: int = 0
    bytes_received: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Statistics:
    """Counters by host, a snapshot."""

    hosts: Mapping[str, HostStatistics]

    @property
    def requests(self) -> int:
        """Requests to all hosts."""
        return sum(h.requests for h in self.hosts.values())

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies from all hosts."""
        return sum(h.bytes_received for h in self.hosts.values())

    @property
    def retries(self) -> int:
        """Retries at all hosts."""
        return sum(h.retries for h in self.hosts.values())
