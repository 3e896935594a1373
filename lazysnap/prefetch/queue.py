# SPDX-License-Identifier: Apache-2.0
"""Fetches before anybody asks: what profiles and landmarks name, then, if wanted, all the rest.

Works through *plans*, of all layers of a process. Those of one host and priority share a *lane*, so
that neither a host that does not answer nor background work keeps others waiting. In a lane a few
requests are made at a time: always of the plan whose next member will be needed first, which is decided
when it is a request's turn. A plan that fails is tried again later, with growing pauses, for ever: after an
outage of the registry the work goes on. Nothing is remembered over a restart, as a plan skips what is
in the cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lazysnap import log
from lazysnap.errors import LazysnapError
from lazysnap.fetch.fetcher import Fetcher, Plan
from lazysnap.fetch.scheduler import Priority, Scheduler

_log = log.get(__name__)
_RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)


@dataclass(slots=True, eq=False)
class _Pause:
    """Growing pauses after failures that follow one another."""

    until: float = float("-inf")
    failures: int = 0

    def failed(self) -> None:
        """Begin a longer pause, unless there is one: requests at the same moment fail together."""
        now = trio.current_time()
        if now >= self.until:
            self.until = now + _RETRY_SECONDS[min(self.failures, len(_RETRY_SECONDS) - 1)]
            self.failures += 1

    def succeeded(self) -> None:
        """The next failure is a first one."""
        self.failures = 0


@dataclass(slots=True, eq=False)
class _Work:
    """One plan under way."""

    fetcher: Fetcher
    plan: Plan
    pause: _Pause
    requests: int = 0
    done: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True, eq=False)
class _Lane:
    """The plans of one host and priority."""

    host: str
    priority: Priority
    # The next more urgent lane of the host goes first as long as it can go on.
    above: _Lane | None = None
    below: _Lane | None = None
    works: list[_Work] = field(default_factory=list)
    # Of the host as a whole; one layer that cannot be had must not hold up the others.
    pause: _Pause = field(default_factory=_Pause)
    workers: int = 0
    more: trio.Event = field(default_factory=trio.Event)

    def notify(self) -> None:
        """Have idle workers look again."""
        self.more.set()
        self.more = trio.Event()
        if self.below is not None:
            self.below.notify()

    def best(self) -> _Work | None:
        """The plan that is to be gone on with now."""
        now = trio.current_time()
        if now < self.pause.until or (self.above is not None and self.above.best() is not None):
            return None
        ready = (work for work in self.works if work.pause.until <= now and not work.plan.ended)
        return min(ready, key=lambda work: work.plan.next_wanted, default=None)

    async def due(self) -> None:
        """Wait until a plan can be gone on with, or there is none left."""
        while self.works and self.best() is None:
            waiting = [work.pause.until for work in self.works if not work.plan.ended]
            wake = max(min(waiting, default=0.0), self.pause.until)
            # If it is not for the time, requests are under way, and tell when they are done.
            with trio.move_on_at(wake if wake > trio.current_time() else float("inf")):
                await self.more.wait()

    def finish(self, work: _Work) -> None:
        """A plan is done, or given up."""
        if work in self.works:
            self.works.remove(work)
            self.notify()
        work.done.set()


class PrefetchQueue:
    """All plans of a process.

    Args:
        scheduler: of the process; says how many requests are made at once.
        nursery: where they run.
        quiet: waits, before each request of the background, until it may be made.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        nursery: trio.Nursery,
        quiet: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> None:
        self._scheduler = scheduler
        self._quiet = quiet
        self._nursery = nursery
        self._lanes: dict[tuple[str, Priority], _Lane] = {}

    def add(
        self, fetcher: Fetcher, plan: Plan, priority: Priority, *, delay_seconds: float = 0.0
    ) -> trio.Event:
        """Take up a plan.

        Args:
            fetcher: of the plan's layer.
            plan: what is to be fetched.
            priority: prefetch or background.
            delay_seconds: wait so long before it begins.

        Returns:
            An event that is set when all of the plan has been dealt with.
        """
        pause = _Pause(trio.current_time() + delay_seconds)
        work = _Work(fetcher, plan, pause)
        if plan.ended:
            work.done.set()
            return work.done
        lane = self._lane(fetcher.host, priority)
        lane.works.append(work)
        lane.notify()
        while lane.workers < self._scheduler.most(priority):
            lane.workers += 1
            self._nursery.start_soon(self._work_through, lane)
        return work.done

    def _lane(self, host: str, priority: Priority) -> _Lane:
        if (host, priority) not in self._lanes:
            urgent, background = _Lane(host, Priority.PREFETCH), _Lane(host, Priority.BACKGROUND)
            urgent.below, background.above = background, urgent
            self._lanes |= {(host, lane.priority): lane for lane in (urgent, background)}
        return self._lanes[host, priority]

    def has(self, fetcher: Fetcher, priority: Priority) -> bool:
        """Whether a plan of a layer is not done."""
        lane = self._lanes.get((fetcher.host, priority))
        return lane is not None and any(work.fetcher is fetcher for work in lane.works)

    def drop(self, fetcher: Fetcher) -> None:
        """Give up the plans of a layer that is gone."""
        for lane in self._lanes.values():
            for work in [work for work in lane.works if work.fetcher is fetcher]:
                lane.finish(work)

    def drop_all(self, priority: Priority) -> None:
        """Give up all plans of a priority."""
        for lane in self._lanes.values():
            if lane.priority is priority:
                for work in list(lane.works):
                    lane.finish(work)

    def pending(self) -> int:
        """How many plans are not done."""
        return sum(len(lane.works) for lane in self._lanes.values())

    async def _work_through(self, lane: _Lane) -> None:
        try:
            while lane.works:
                await lane.due()
                if lane.priority is Priority.BACKGROUND:
                    await self._quiet()
                await self._step(lane)
                # A plan of what is there already must not keep readers waiting.
                await trio.lowlevel.checkpoint()
        finally:
            lane.workers -= 1

    async def _step(self, lane: _Lane) -> None:
        """One request, of the plan that is first when the ticket is there."""
        async with self._scheduler.ticket(lane.host, lane.priority) as ticket:
            work = lane.best()
            if work is None:
                return
            work.requests += 1
            try:
                await work.fetcher.fetch_ahead(work.plan, ticket)
            except LazysnapError as error:  # logged by the fetcher
                self._failed(lane, work, error)
            except Exception:  # a bug here must not end the worker
                _log.exception("fetching ahead failed")
                lane.finish(work)
            else:
                work.pause.succeeded()
                lane.pause.succeeded()
            finally:
                work.requests -= 1
        if work.plan.ended and not work.requests:
            await self._close(lane, work)
        lane.notify()

    async def _close(self, lane: _Lane, work: _Work) -> None:
        """A plan is done when what others were bringing has come, too."""
        work.requests += 1
        try:
            await work.fetcher.settle(work.plan)
        except LazysnapError as error:
            self._failed(lane, work, error)
        finally:
            work.requests -= 1
        if work.plan.ended and not work.requests:
            lane.finish(work)

    @staticmethod
    def _failed(lane: _Lane, work: _Work, error: LazysnapError) -> None:
        work.pause.failed()
        if error.retryable:
            lane.pause.failed()
