# SPDX-License-Identifier: Apache-2.0
"""Remembers what a process fetched lately, and who waited for it: for people, see `lazysnap report`.

An event costs one small object and is noted for a request or a read that waits, never for a read that
does not. The oldest are dropped, so that memory is bounded. Nothing depends on it.

Times are by time.monotonic(), which all processes of a machine share.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count

import msgspec

from lazysnap.fetch.scheduler import Priority, Ticket

_MOST = 20_000


class Fetched(msgspec.Struct, array_like=True, gc=False):
    """A request.

    Attributes:
        began: when it was made.
        ended: when all of it was stored; None if it is under way.
        first: number of its first member.
        last: number of its last member.
        begin: blob offset of its first byte.
        end: blob offset behind its last byte.
        priority: that it was begun with, a `Priority`.
        urgent: that it ended with; another one if a reader came to wait for it.
        received: bytes that came over the network.
        failed: not all of it arrived.
    """

    began: float
    ended: float | None
    first: int
    last: int
    begin: int
    end: int
    priority: int
    urgent: int
    received: int = 0
    failed: bool = False


class Waited(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A read that waited for members.

    Attributes:
        began: when it began to wait.
        seconds: how long it did.
        node: of the file.
        offset: in the file, in bytes.
        size: in bytes.
        ahead: some of it was being fetched ahead of it already.
    """

    began: float
    seconds: float
    node: int
    offset: int
    size: int
    ahead: bool


class Told(msgspec.Struct, kw_only=True, frozen=True):
    """The answer of a worker for one slot; times by time.monotonic().

    Attributes:
        slot: number.
        fetched: requests, in the order of their beginnings.
        waited: reads, in the order of their ends.
        forgotten: events of any layer that had to be dropped.
        started: when the worker was; it knows of nothing before.
        now: when this was told.
        round_trip: seconds to the first byte of the registry's answers, the least of late; 0 if unknown.
        bandwidth: bytes per second while something arrives; 0 if unknown.
        recording: what is read is being recorded.
    """

    slot: int
    fetched: list[Fetched] = []
    waited: list[Waited] = []
    forgotten: int = 0
    started: float
    now: float
    round_trip: float = 0.0
    bandwidth: float = 0.0
    recording: bool = False


@dataclass(slots=True)
class _Ring:
    """The last events of a process, each with the number of its layer's trace."""

    events: deque[tuple[int, Fetched | Waited]]
    noted: int = 0

    def note(self, layer: int, event: Fetched | Waited) -> None:
        self.events.append((layer, event))
        self.noted += 1


_ring = _Ring(deque(maxlen=_MOST))
_numbers = count()


class Trace:
    """Events of one layer; they end up in one ring for all layers of the process."""

    def __init__(self) -> None:
        self._number = next(_numbers)

    @asynccontextmanager
    async def request(
        self, run: Sequence[int], begin: int, end: int, ticket: Ticket
    ) -> AsyncIterator[Fetched]:
        """Note a request, which is made and stored in the body.

        Args:
            run: its members, ascending.
            begin: blob offset of its first byte.
            end: blob offset behind its last byte.
            ticket: of the request.

        Yields:
            The event; what is received is to be added up in it.
        """
        began = time.monotonic()
        priority = int(ticket.priority)
        event = Fetched(
            began=began,
            ended=None,
            first=run[0],
            last=run[-1],
            begin=begin,
            end=end,
            priority=priority,
            urgent=priority,
        )
        _ring.note(self._number, event)
        try:
            yield event
        except BaseException:
            event.failed = True
            raise
        finally:
            event.urgent = int(ticket.priority)
            event.ended = time.monotonic()

    @contextmanager
    def waiting(self, node: int, offset: int, size: int, ahead: bool | None) -> Iterator[None]:
        """Note a read, which waits in the body.

        Args:
            node: of the file.
            offset: in the file, in bytes.
            size: in bytes.
            ahead: whether some of it was being fetched ahead; None if there is nothing to wait for.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            if ahead is not None:
                seconds = time.monotonic() - began
                _ring.note(
                    self._number,
                    Waited(
                        began=began,
                        seconds=seconds,
                        node=node,
                        offset=offset,
                        size=size,
                        ahead=ahead,
                    ),
                )

    def events(self, since: float) -> tuple[list[Fetched], list[Waited]]:
        """The events of this layer.

        Args:
            since: leave out what began before.
        """
        mine = [e for number, e in _ring.events if number == self._number and e.began >= since]
        fetched = [event for event in mine if isinstance(event, Fetched)]
        return fetched, [event for event in mine if isinstance(event, Waited)]


def forgotten() -> int:
    """How many events of this process were dropped."""
    return _ring.noted - len(_ring.events)


def label(priority: int) -> str:
    """The name of a class of requests for people; classes of later releases by their number."""
    try:
        return Priority(priority).label
    except ValueError:
        return str(priority)
