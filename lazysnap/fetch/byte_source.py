# SPDX-License-Identifier: Apache-2.0
"""The source that a blob is read from, and its counters: the seam between fetching and the registry.

Knows nothing of members or of the cache.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from lazysnap.fetch.scheduler import Priority


class ByteSource(Protocol):
    """Where a layer's blob is read from."""

    def read_stream(
        self, start: int, length: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Bytes of the blob as they arrive: `length` in total, or an error."""
        ...


class LocalBytes(bytes):
    """Bytes of a stream that have not come over the network, and say nothing of its speed."""

    __slots__ = ()


@dataclass(slots=True)
class Counters:
    """Counts what was fetched for a layer; sizes in bytes."""

    requests: int = 0
    bytes_fetched: int = 0
    bytes_decoded: int = 0
    bytes_by_class: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))
    errors: int = 0
    last_error: str = ""
