# SPDX-License-Identifier: Apache-2.0
"""Decides which members of one layer are fetched from its blob, and in which requests.

A *member* (a compressed range that is decoded as a whole) is the unit of fetching. One request covers
a run of missing members: those a reader waits for, and the ones behind them as far as the window
reaches. The window grows while reads are sequential in the blob, and shrinks when they are not. How a
request is made, and that there is only one for a member at a time, is up to `Requests`.

Invariant: all state is touched on the event loop only and never left half done across an await.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lazysnap.errors import DigestMismatch, FormatError
from lazysnap.fetch.members import adjoin, present, runs
from lazysnap.fetch.requests import Flight, Requests
from lazysnap.fetch.scheduler import Priority, Scheduler, Ticket
from lazysnap.index.reader import LayerIndex

_WINDOW_LEAST = 256 << 10
_WINDOW_FIRST_MOST = 2 << 20
# Four members of the usual 4 MiB: some are decoded and stored while others arrive.
_WINDOW_MOST = 17 << 20
_UNURGENT_LEAST = 512 << 10
_UNURGENT_MOST = 8 << 20
# Members that are looked at in one turn of the event loop, and no further one after so many chunks:
# each takes about ten microseconds.
_LOOK_MOST = 256
_LOOK_CHUNKS = 2048


@dataclass(slots=True, eq=False)
class Plan:
    """Members of one layer that are to be fetched ahead.

    Attributes:
        members: their numbers, in the order in which they are wanted.
        position: how many of them have been dealt with.
        wanted_at: for each, when it will be needed, in any unit that other plans share; if shorter
            than `members`, the rest is wanted last.
        others: what was on its way already, by position.
    """

    members: Sequence[int]
    position: int = 0
    wanted_at: Sequence[float] = ()
    others: dict[int, Flight] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether all members have been dealt with."""
        return self.position >= len(self.members)

    @property
    def next_wanted(self) -> float:
        """When the next member will be needed."""
        if self.position < len(self.wanted_at):
            return self.wanted_at[self.position]
        return float("inf")


class Fetcher:
    """Fetches members of one layer.

    Args:
        index: the layer's index.
        requests: for its members.
        scheduler: knows the host that they go to.

    Attributes:
        index: as above.
        requests: as above.
        host: the registry's, by which the scheduler knows it.
    """

    def __init__(self, index: LayerIndex, requests: Requests, scheduler: Scheduler) -> None:
        self.index = index
        self.requests = requests
        self.host = requests.host
        self._scheduler = scheduler
        self._window = _WINDOW_LEAST
        self._sequential = False
        self._next_sequential = -1
        self._ahead_from = -1

    def fetch(self, members: Sequence[int]) -> list[Flight]:
        """Start fetching, for a reader that waits, what is not on its way already.

        Args:
            members: numbers of missing members, ascending.

        Returns:
            One flight for each.
        """
        under_way = self.requests.flights
        new = [number for number in members if number not in under_way]
        if new:
            self._adapt(new[0])
            wanted = runs(self.index, new)
            wanted[-1].extend(self._neighbours(wanted[-1][-1]))
            self._start(wanted)
        elif members and members[0] == self._next_sequential:
            # Somebody else brings what a sequential reader wants; it still is one.
            self._next_sequential = members[-1] + 1
        elif members:
            # It waits for what was fetched ahead of it, so that was not far enough.
            self.advance(members[0])
        flights = [under_way[number] for number in members]
        for flight in flights:
            if flight.ticket is not None:
                flight.ticket.boost(Priority.DEMAND)
        return flights

    def advance(self, member: int) -> None:
        """A reader has come to a member that is there; goes on before it if it reads in sequence.

        Args:
            member: what was just read from.
        """
        if not self._sequential or member < self._ahead_from or member >= self._next_sequential:
            return
        self._window = min(self._window * 2, _WINDOW_MOST)
        run = self._neighbours(self._next_sequential - 1)
        if run:
            self._start([run])
        else:
            self._ahead_from = self._next_sequential

    async def fetch_ahead(self, plan: Plan, ticket: Ticket) -> None:
        """Fetch the next members of a plan before anybody asks, in one request.

        Members that are there or on their way are skipped, but only so many at a time that readers do
        not have to wait for that. Members whose bytes are wrong are skipped, too.

        Args:
            plan: what is wanted; its position moves on, and back again if fetching fails.
            ticket: of the request.

        Raises:
            LazysnapError: something could not be fetched.
        """
        run = self._next_run(plan, ticket.priority)
        if not run:
            return
        begin = plan.position - len(run)
        flights = self.requests.begin(run)
        for flight in flights.values():
            flight.ticket = ticket
        await self.requests.bring(flights, ticket)
        _check(plan, dict(enumerate(flights.values(), begin)))

    async def settle(self, plan: Plan) -> None:
        """Wait, at the end of a plan, for what others were bringing already.

        Raises:
            LazysnapError: something could not be fetched; the plan goes back to it.
        """
        others, plan.others = plan.others, {}
        for flight in others.values():
            await flight.landed.wait()
        _check(plan, others)

    def _next_run(self, plan: Plan, priority: Priority) -> list[int]:
        """The plan's next missing members that lie together, up to a fair request.

        Small, so that a reader who needs the connection's capacity does not wait long; but not so
        small that round trips dominate.
        """
        host = self._scheduler.host(self.host)
        left = min(max(int(host.bandwidth / 10), _UNURGENT_LEAST), _UNURGENT_MOST)
        run: list[int] = []
        looks = _LOOK_CHUNKS
        start = plan.position
        for position in range(start, min(start + _LOOK_MOST, len(plan.members))):
            number = plan.members[position]
            looks -= self.index.member(number).chunk_count
            if looks < 0 and position > start:
                break
            if run and not adjoin(self.index, run[-1], number):
                break
            flight = self.requests.flights.get(number)
            if flight is not None or self.present(number):
                if run:
                    break
                if flight is not None:
                    plan.others[position] = flight
                    if flight.ticket is not None:
                        flight.ticket.boost(priority)
            else:
                member = self.index.member(number)
                left -= member.blob_end - member.blob_offset
                if run and left < 0:
                    break
                run.append(number)
            plan.position = position + 1
        return run

    def _start(self, runs: Sequence[list[int]]) -> None:
        """Fetch for a reader."""
        last = runs[-1]
        self._next_sequential = last[-1] + 1
        # As the kernel does: as soon as a reader comes to what was asked for last, ask for more.
        self._ahead_from = last[0]
        for run in runs:
            self.requests.start(run)

    def present(self, number: int) -> bool:
        """Whether all chunks of a member are in the cache, as far as can be told without reading."""
        return present(self.requests.cache, self.index, number)

    def _adapt(self, first: int) -> None:
        """Size the window: by the host while reads are random, larger and larger in sequence."""
        self._sequential = first == self._next_sequential
        if self._sequential:
            self._window = min(self._window * 2, _WINDOW_MOST)
        else:
            product = int(self._scheduler.host(self.host).product())
            self._window = min(max(product, _WINDOW_LEAST), _WINDOW_FIRST_MOST)

    def _neighbours(self, last: int) -> list[int]:
        """The missing members right behind `last` that the window covers."""
        found: list[int] = []
        left = self._window
        looks = _LOOK_CHUNKS
        for number in range(last + 1, min(last + 1 + _LOOK_MOST, self.index.member_count)):
            if not adjoin(self.index, number - 1, number):
                break
            member = self.index.member(number)
            looks -= member.chunk_count
            if looks < 0 and found:
                break
            left -= member.blob_end - member.blob_offset
            # In sequence one more is worth its size: it will be wanted.
            whole = left >= 0 or (self._sequential and not found)
            if not whole or number in self.requests.flights or self.present(number):
                break
            found.append(number)
        return found


def _check(plan: Plan, flights: Mapping[int, Flight]) -> None:
    """See how the flights of a plan went; goes back to the first that has to be tried again.

    Args:
        plan: whose.
        flights: that have landed, by position.

    Raises:
        LazysnapError: why it failed. Not for wrong bytes: they would come again, and hold up the rest.
    """
    for position, flight in sorted(flights.items(), key=lambda item: item[0]):
        if flight.error is not None and not isinstance(flight.error, DigestMismatch | FormatError):
            plan.position = min(position, plan.position)
            raise flight.error
