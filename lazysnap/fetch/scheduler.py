# SPDX-License-Identifier: Apache-2.0
"""One order for all fetching of a process: what a reader waits for, then prefetch, then background.

Each request holds a *ticket*. Tickets are given out by priority, a bounded number for each host; less
urgent requests get fewer of them, so that a reader finds a free one. While bytes for a reader arrive,
less urgent streams of the same host hold still, apart from a small share that keeps them from starving.
A ticket can become more urgent when a reader comes to wait for it. The measures of a host (round trip
time, bandwidth) say how large requests should be. Knows nothing of layers or HTTP.

Invariant: a ticket is granted by whoever makes it possible, in a plain function on the event loop, so
none is ever free while somebody who may have it waits.
"""

from __future__ import annotations

import enum
import os
from bisect import bisect_left, insort
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

# Unurgent streams get about this share of the bandwidth while bytes for a reader arrive; each piece of
# theirs is held for at least and at most so long.
_SHARE = 0.1
_HOLD_LEAST_SECONDS = 0.1
_HOLD_MOST_SECONDS = 2.0
# A stream that is not urgent gives way to others for at most so long.
_STARVED_SECONDS = 1.0
_BURST_SECONDS = 0.1
_SAMPLE_BYTES = 256 << 10
_SAMPLE_SECONDS = 0.01
_SMOOTH = 0.3


class Priority(enum.IntEnum):
    """How urgent a request is; less is more."""

    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2

    @property
    def label(self) -> str:
        """The name for people."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on fetching; for one process.

    Attributes:
        connections: requests at once to one host; at least one is made.
        unurgent_connections: those of them that may be prefetch or background; one is always left to
            readers if there are two or more.
        background_connections: those of them that may be background; one of the others is always left
            to prefetch, which may come at any moment.
        bytes_per_second: of all hosts together; 0 is no limit.
        host_bytes_per_second: of each host; 0 is no limit.
    """

    connections: int = 16
    unurgent_connections: int = 6
    background_connections: int = 2
    bytes_per_second: int = 0
    host_bytes_per_second: int = 0


class _Bucket:
    """Lets through so many bytes a second on average, and a tenth of a second's worth at once."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._free_at = float("-inf")

    async def take(self, count: int, *, urgent: bool) -> None:
        """Account for `count` bytes, and wait as long as they should have taken.

        A stream that is not urgent first waits until no other one does, so that urgent ones never wait
        for more than one piece of it.
        """
        if self.rate <= 0:
            return
        if not urgent:
            with trio.move_on_after(_STARVED_SECONDS):
                while self._free_at > trio.current_time():
                    await trio.sleep_until(self._free_at)
        now = trio.current_time()
        self._free_at = until = max(self._free_at, now - _BURST_SECONDS) + count / self.rate
        if until > now:
            await trio.sleep_until(until)


@dataclass(slots=True, eq=False)
class Host:
    """All that is known of one host.

    Attributes:
        round_trip: seconds from a request to its first byte; the least seen lately.
        bandwidth: bytes per second while something arrives; 0 until it was measured.
        active: tickets that are held.
        waiting: tickets that are wanted, the next one first.
    """

    round_trip: float = 0.0
    bandwidth: float = 0.0
    active: list[Ticket] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)
    bucket: _Bucket = field(default_factory=lambda: _Bucket(0))
    calmer: trio.Event = field(default_factory=trio.Event)
    arriving: int = 0
    sample_bytes: int = 0
    sample_seconds: float = 0.0
    since: float = 0.0
    latest: float = 0.0

    def receiving(self, below: Priority) -> bool:
        """Whether bytes for something more urgent arrive."""
        return any(ticket.receiving and ticket.priority < below for ticket in self.active)

    def unurgent(self) -> int:
        """How many requests nobody waits for."""
        return sum(ticket.priority != Priority.DEMAND for ticket in self.active)

    def product(self) -> float:
        """Bytes that fit into one round trip; 0 until both are measured."""
        return self.round_trip * self.bandwidth

    def note_first_bytes(self, seconds: float) -> None:
        """An answer began to arrive so long after its request."""
        # Slowly forgets, so that a path that became longer is noticed.
        self.round_trip = min(seconds, self.round_trip * 1.05) if self.round_trip else seconds
        if self.arriving == 0:
            self.since = self.latest = trio.current_time()
        self.arriving += 1

    def note_bytes(self, count: int) -> None:
        """More bytes of an answer have arrived; every so many of them, the bandwidth is estimated.

        The first ones of an answer do not count: how long they took is hidden in the round trip.
        """
        self.latest = now = trio.current_time()
        self.sample_bytes += count
        seconds = self.sample_seconds + (now - self.since)
        if self.sample_bytes >= _SAMPLE_BYTES and seconds >= _SAMPLE_SECONDS:
            rate = self.sample_bytes / seconds
            self.bandwidth += (rate - self.bandwidth) * (_SMOOTH if self.bandwidth else 1)
            self.sample_bytes, self.sample_seconds, self.since = 0, 0.0, now

    def note_end(self) -> None:
        """An answer has arrived, or broke off."""
        self.arriving -= 1
        if self.arriving == 0:
            self.sample_seconds += self.latest - self.since

    def calm(self) -> None:
        """Have the streams that hold still look again."""
        self.calmer.set()
        self.calmer = trio.Event()


class Ticket:
    """The right to have one request under way.

    Attributes:
        priority: may become more urgent, see `boost`.
        receiving: bytes of its answer have begun to arrive.
    """

    def __init__(self, scheduler: Scheduler, host: Host, priority: Priority, serial: int) -> None:
        self.priority = priority
        self.receiving = False
        self.place = (int(priority), serial)
        self.granted = trio.Event()
        self.began = trio.current_time()
        self._scheduler = scheduler
        self._host = host

    def boost(self, priority: Priority) -> None:
        """Somebody more urgent waits for this."""
        if priority < self.priority:
            self.priority = priority
            self._host.calm()
            self._scheduler.grant(self._host)

    async def received(self, count: int) -> None:
        """Account for bytes that have arrived; waits while others go first.

        Args:
            count: bytes since the last call.
        """
        host = self._host
        if self.receiving:
            host.note_bytes(count)
        else:
            self.receiving = True
            host.note_first_bytes(trio.current_time() - self.began)
        urgent = self.priority == Priority.DEMAND
        await self._scheduler.total.take(count, urgent=urgent)
        await host.bucket.take(count, urgent=urgent)
        if host.receiving(self.priority):
            with trio.move_on_after(self._hold_seconds(count)):
                while host.receiving(self.priority):
                    await host.calmer.wait()

    def _hold_seconds(self, count: int) -> float:
        """For how long a stream holds still after so many bytes, to keep to its share."""
        host = self._host
        if not host.bandwidth:
            return _HOLD_LEAST_SECONDS
        fair = count * host.unurgent() / (_SHARE * host.bandwidth)
        return min(max(fair, _HOLD_LEAST_SECONDS), _HOLD_MOST_SECONDS)


class Scheduler:
    """Orders the requests of a process.

    Args:
        limits: bounds on fetching.

    Attributes:
        leisure: bounds the threads that decode what nobody waits for, to half of the CPUs: more of
            them would take the CPUs from what is urgent, and the interpreter's lock from each other.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.total = _Bucket(self.limits.bytes_per_second)
        self.leisure = trio.CapacityLimiter(max(len(os.sched_getaffinity(0)) // 2, 1))
        self._connections = max(self.limits.connections, 1)
        self._hosts: dict[str, Host] = {}
        self._serial = 0

    def leave_to_readers(self, decoders: int) -> None:
        """Have one decoding thread do nothing but what is urgent, if there are several.

        Args:
            decoders: how many threads decode.
        """
        half = max(len(os.sched_getaffinity(0)) // 2, 1)
        self.leisure.total_tokens = max(min(half, decoders - 1), 1)

    def apply(self, limits: Limits) -> None:
        """Keep to other limits from now on; what is under way goes on."""
        self.limits = limits
        self.total.rate = limits.bytes_per_second
        self._connections = max(limits.connections, 1)
        for host in self._hosts.values():
            host.bucket.rate = limits.host_bytes_per_second
            self.grant(host)

    def host(self, name: str) -> Host:
        """All that is known of a host."""
        found = self._hosts.get(name)
        if found is None:
            bucket = _Bucket(self.limits.host_bytes_per_second)
            found = self._hosts[name] = Host(bucket=bucket)
        return found

    def most(self, priority: Priority) -> int:
        """How many requests of a priority may be under way to one host."""
        if priority == Priority.DEMAND:
            return self._connections
        unurgent = min(self.limits.unurgent_connections, self._connections - 1)
        if priority == Priority.BACKGROUND:
            unurgent = min(self.limits.background_connections, unurgent - 1)
        return max(unurgent, 1)

    @asynccontextmanager
    async def ticket(self, host_name: str, priority: Priority) -> AsyncIterator[Ticket]:
        """Wait for a turn, and hold a ticket in the body.

        Args:
            host_name: the registry's host.
            priority: how urgent it is.
        """
        host = self.host(host_name)
        self._serial += 1
        ticket = Ticket(self, host, priority, self._serial)
        insort(host.waiting, ticket, key=lambda other: other.place)
        self.grant(host)
        try:
            if not ticket.granted.is_set():
                await ticket.granted.wait()
            yield ticket
        finally:
            if ticket.granted.is_set():
                host.active.remove(ticket)
                if ticket.receiving:
                    host.note_end()
                    host.calm()
            else:
                host.waiting.remove(ticket)
            self.grant(host)

    def grant(self, host: Host) -> None:
        """Give out the tickets that can be had now."""
        while (ticket := self._next(host)) is not None:
            host.waiting.remove(ticket)
            host.active.append(ticket)
            ticket.began = trio.current_time()
            ticket.granted.set()

    def _next(self, host: Host) -> Ticket | None:
        """Whose turn it is."""
        if not host.waiting or len(host.active) >= self._connections:
            return None
        first = host.waiting[0]
        unurgent = host.unurgent()
        if first.priority != Priority.DEMAND:
            return first if unurgent < self.most(first.priority) else None
        if not unurgent:
            # A stream of reads that never ends must not keep everything else waiting for ever.
            at = bisect_left(host.waiting, (1, 0), key=lambda ticket: ticket.place)
            if at < len(host.waiting):
                other = host.waiting[at]
                if trio.current_time() - other.began >= _STARVED_SECONDS:
                    return other
        return first
