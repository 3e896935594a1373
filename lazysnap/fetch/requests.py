# SPDX-License-Identifier: Apache-2.0
"""Brings runs of members of one layer into the cache: one request each, decoded beside receiving.

There is at most one *flight* for a member at a time, whoever waits for it. Wrong bytes are asked for
once more. Does not choose what is fetched, and when.

Invariant: all state is touched on the event loop only and never left half done across an await; every
flight that was begun lands.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import trio

from lazysnap import log, tracing
from lazysnap.errors import DigestMismatch, FormatError, Internal, LazysnapError
from lazysnap.fetch.byte_source import ByteSource, Counters, LocalBytes
from lazysnap.fetch.decode import Decoded, Store, decode_members
from lazysnap.fetch.members import runs
from lazysnap.fetch.open_files import OpenFiles, Parts, store_chunk
from lazysnap.fetch.scheduler import Priority, Scheduler, Ticket
from lazysnap.fetch.threads import ELSEWHERE
from lazysnap.fetch.trace import Trace
from lazysnap.index.model import Chunk
from lazysnap.index.reader import LayerIndex
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts

_log = log.get(__name__)
_BATCH = 1 << 20
_COMPLAIN_EVERY_SECONDS = 10.0

Piece = bytes | memoryview


@dataclass(slots=True, eq=False)
class Flight:
    """A member that is being fetched.

    Attributes:
        landed: set when it is in the cache, or in `unstored`, or cannot be had.
        error: why it cannot be had.
        unstored: its chunks that the cache could not take, by number.
        ticket: of the request that brings it, once there is one.
    """

    landed: trio.Event = field(default_factory=trio.Event)
    error: LazysnapError | None = None
    unstored: dict[int, bytes] = field(default_factory=dict)
    ticket: Ticket | None = None


Flights = Mapping[int, Flight]
"""By member."""


class _Received:
    """Bytes of an answer that have not been handed on; they are put together only in a thread.

    Attributes:
        base: blob offset of the first one.
        end: blob offset behind the last one.
    """

    def __init__(self, base: int) -> None:
        self.base = self.end = base
        self._pieces: list[Piece] = []

    def add(self, data: Piece) -> None:
        """Append bytes."""
        self._pieces.append(data)
        self.end += len(data)

    def take(self, cut: int) -> list[Piece]:
        """Remove the bytes before the blob offset `cut`, and return them."""
        taken, self._pieces = self._pieces, []
        beyond = self.end - cut
        self.base = cut
        while beyond:
            last = taken.pop()
            kept = min(beyond, len(last))
            beyond -= kept
            self._pieces.append(memoryview(last)[len(last) - kept :])
            if kept < len(last):
                taken.append(memoryview(last)[: len(last) - kept])
        self._pieces.reverse()
        return taken


class Requests:
    """The requests for members of one layer.

    Args:
        index: the layer's index.
        source: its blob.
        counters: where what is fetched is counted.
        contents: the process's table of open contents.
        nursery: where requests for readers run, so that they go on when a reader is interrupted, and
            where complete files are made objects.
        decoders: bounds the threads that decode.
        scheduler: gives each request its turn.
        host: the registry's, by which the scheduler knows it.
        name: of the layer, for the log.

    Attributes:
        cache: where members are stored.
        flights: all members that are on their way.
        kept: members whose chunks evaporate from a full cache before anybody has read them: they are
            handed to whoever waits.
        counters: as above.
        host: as above.
        trace: of the layer.
    """

    def __init__(
        self,
        index: LayerIndex,
        source: ByteSource,
        counters: Counters,
        *,
        contents: OpenFiles,
        nursery: trio.Nursery,
        decoders: trio.CapacityLimiter,
        scheduler: Scheduler,
        host: str,
        name: str,
    ) -> None:
        self.index = index
        self.trace = Trace()
        self.counters = counters
        self.cache = contents.cache
        self.flights: dict[int, Flight] = {}
        self.kept: set[int] = set()
        self.host = host
        self._source = source
        self._contents = contents
        self._nursery = nursery
        self._decoders = decoders
        self._scheduler = scheduler
        self._name = name
        self._complained = float("-inf")

    def begin(self, run: Sequence[int]) -> dict[int, Flight]:
        """Note that members are on their way; nothing may fail before one of `bring` takes over."""
        flights = {number: Flight() for number in run}
        self.flights |= flights
        return flights

    def start(self, run: Sequence[int]) -> None:
        """Fetch a run of adjacent members for a reader, as soon as the scheduler allows it."""
        self._nursery.start_soon(self._bring_in_turn, self.begin(run))

    async def _bring_in_turn(self, flights: Flights) -> None:
        try:
            async with self._scheduler.ticket(self.host, Priority.DEMAND) as ticket:
                await self.bring(flights, ticket)
        finally:
            self._fail(flights, Internal("fetching was stopped"))  # before its turn came

    async def bring(self, flights: Flights, ticket: Ticket) -> None:
        """Fetch a run of adjacent members; never raises, each flight says how it went."""
        error: LazysnapError = Internal("fetching was stopped")
        began = time.monotonic()
        try:
            with tracing.span("fetch", layer=self._name, members=len(flights)):
                wrong = await self._request(list(flights), flights, ticket)
            if wrong:
                # They may come from a proxy's cache or a broken connection: ask once more.
                why = next(iter(wrong.values()))
                _log.warning("wrong bytes, asking again", layer=self._name, error=why)
                for part in runs(self.index, sorted(wrong)):
                    for number, why in (await self._request(part, flights, ticket)).items():
                        self._fail({number: flights[number]}, why)
        except* LazysnapError as group:
            error = _first(group)
        except* Exception as group:  # a bug here must not end the worker
            _log.exception("fetching failed")
            error = Internal(f"fetching failed: {group.exceptions[0]!r}")
        finally:
            self._fail(flights, error)
            counts.observe(families.FETCH_SECONDS, ticket.priority.label, time.monotonic() - began)

    def _fail(self, flights: Flights, error: LazysnapError) -> None:
        """Those that have not landed never will."""
        failed = {n: flight for n, flight in flights.items() if not flight.landed.is_set()}
        for number, flight in failed.items():
            flight.error = error
            self._touch_down(number, flight)
        if failed:
            self._complain(error)

    def _touch_down(self, number: int, flight: Flight) -> None:
        # A member that has landed can be missing again, and in a flight of somebody else's.
        if self.flights.get(number) is flight:
            del self.flights[number]
        flight.landed.set()

    async def _request(
        self, run: Sequence[int], flights: Flights, ticket: Ticket
    ) -> dict[int, LazysnapError]:
        """One request for a run; decoding goes on beside receiving.

        Args:
            run: adjacent members.
            flights: theirs, perhaps among others.
            ticket: of the request.

        Returns:
            The members that were received and are wrong.
        """
        wrong: dict[int, LazysnapError] = {}
        ends = [self.index.member(number).blob_end for number in run]
        start = self.index.member(run[0]).blob_offset
        self.counters.requests += 1
        first = done = 0  # of `run`: the first that is not being decoded, and not received
        async with (
            self.trace.request(run, start, ends[-1], ticket) as noted,
            self._source.read_stream(start, ends[-1] - start) as stream,
            trio.open_nursery() as decoding,
        ):
            received = _Received(start)
            async for data in stream:
                received.add(data)
                if not isinstance(data, LocalBytes):
                    noted.received += len(data)
                    self.counters.bytes_fetched += len(data)
                    self.counters.bytes_by_class[ticket.priority] += len(data)
                    counts.add(families.FETCH_BYTES, ticket.priority.label, len(data))
                    await ticket.received(len(data))
                done = bisect_right(ends, received.end, done)
                if done == first:
                    continue
                idle = all(limit.available_tokens > 0 for limit in self._limits(ticket))
                cut = ends[done - 1]
                if idle or done == len(run) or cut - received.base >= _BATCH:
                    base = received.base
                    mine = {n: flights[n] for n in run[first:done]}
                    first = done
                    decode = partial(self._decode, ticket=ticket, wrong=wrong)
                    await decoding.start(decode, mine, received.take(cut), base)
        if first < len(run):
            raise Internal(f"{self._name}: a response ended early")
        return wrong

    async def _decode(
        self,
        flights: Flights,
        data: Sequence[Piece],
        base: int,
        *,
        ticket: Ticket,
        wrong: dict[int, LazysnapError],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        index, members = self.index, list(flights)
        parts: dict[int, Parts | None] = {}
        store = partial(self._store, parts)
        try:
            for number in members:
                for i in index.member_chunks(number):
                    node = index.chunk(i).node
                    file = index.file(node)
                    if file.partial_key is not None and node not in parts:
                        held = parts[node] = self._contents.create(index, file)
                        if held is not None:
                            self._contents.hold(held)
            async with AsyncExitStack() as limits:
                for limit in self._limits(ticket):
                    await limits.enter_async_context(limit)
                task_status.started()
                decode = partial(_decode, index, members, data, base, store=store)
                decoded, bad = await trio.to_thread.run_sync(decode, limiter=ELSEWHERE)
            wrong.update(bad)
            self._land({n: flight for n, flight in flights.items() if n not in bad}, decoded)
            for node, held in parts.items():
                if held is not None and self._contents.may_promote(held):
                    self._nursery.start_soon(self._promote, held, node)
        finally:
            for held in parts.values():
                if held is not None:
                    self._contents.release(held)

    def _limits(self, ticket: Ticket) -> Sequence[trio.CapacityLimiter]:
        """The bounds of the threads that decode for a request."""
        if ticket.priority == Priority.DEMAND:
            return (self._decoders,)
        return (self._scheduler.leisure, self._decoders)

    def _store(
        self, parts: Mapping[int, Parts | None], i: int, chunk: Chunk, data: memoryview
    ) -> bool:
        """In a thread: store a chunk; False also for one that is handed to whoever waits."""
        stored = store_chunk(self._contents, self.index, parts, i, chunk=chunk, data=data)
        return stored and chunk.member not in self.kept

    def _land(self, flights: Flights, decoded: Decoded) -> None:
        self.counters.bytes_decoded += decoded.size
        for number, flight in flights.items():
            if decoded.unstored:
                for i in self.index.member_chunks(number):
                    if i in decoded.unstored:
                        flight.unstored[i] = decoded.unstored[i]
            self._touch_down(number, flight)

    async def _promote(self, parts: Parts, node: int) -> None:
        """Make a complete file an object.

        It is not held, as many may wait for their turn: it is made an object by its name.
        """

        def promote() -> bool:
            return self._contents.promote(parts, self.index.stored_size(self.index.file(node)))

        limiter = self._contents.threads.promotions
        if await trio.to_thread.run_sync(promote, limiter=limiter):
            self._contents.forget_partial(parts.key)

    def _complain(self, error: LazysnapError) -> None:
        self.counters.errors += 1
        self.counters.last_error = str(error)
        counts.add(families.FETCH_ERRORS)
        now = time.monotonic()
        if now - self._complained > _COMPLAIN_EVERY_SECONDS:
            self._complained = now
            _log.error("reading failed", layer=self._name, error=error, hint=error.hint or "")


def _decode(
    index: LayerIndex, members: Sequence[int], pieces: Sequence[Piece], base: int, store: Store
) -> tuple[Decoded, dict[int, LazysnapError]]:
    """In a thread: `decode_members`, so that a wrong member does not spoil the others."""
    data = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
    try:
        return decode_members(index, members, data, base, store), {}
    except (DigestMismatch, FormatError) as error:
        if len(members) == 1:
            return Decoded(), {members[0]: error}
    decoded = Decoded()
    wrong: dict[int, LazysnapError] = {}
    for number in members:
        one, bad = _decode(index, [number], [data], base, store)
        decoded.size += one.size
        decoded.unstored.update(one.unstored)
        wrong.update(bad)
    return decoded, wrong


def _first(group: BaseExceptionGroup[LazysnapError]) -> LazysnapError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
