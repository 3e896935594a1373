# SPDX-License-Identifier: Apache-2.0
"""Working through plans: order, outages, ends; in the time of trio's mock clock.

The fetcher is a stand-in, as what fetching does is tested in test_fetch_ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import pytest
import trio
import trio.testing

from lazysnap.errors import LazysnapError, RegistryNotFound, RegistryUnreachable
from lazysnap.fetch.fetcher import Fetcher, Plan
from lazysnap.fetch.scheduler import Limits, Priority, Scheduler, Ticket
from lazysnap.prefetch.queue import PrefetchQueue

PREFETCH, BACKGROUND = Priority.PREFETCH, Priority.BACKGROUND


class FakeFetcher:
    """Takes a second for each member."""

    def __init__(self, host: str = "h", name: str = "", log: list[str] | None = None) -> None:
        self.host = host
        self.name = name
        self.log = [] if log is None else log
        self.times: list[float] = []
        self.fault: Callable[[], LazysnapError | None] = lambda: None
        self.settled = 0
        self.seconds = 1.0

    async def fetch_ahead(self, plan: Plan, ticket: Ticket) -> None:
        assert not plan.ended
        self.times.append(trio.current_time())
        position = plan.position
        plan.position += 1
        await trio.sleep(self.seconds)
        error = self.fault()
        if error is not None:
            plan.position = min(plan.position, position)
            raise error
        self.log.append(f"{self.name}{plan.members[position]}")

    async def settle(self, plan: Plan) -> None:
        self.settled += 1


def _real(fake: FakeFetcher) -> Fetcher:
    return cast(Fetcher, fake)


def _ahead(nursery: trio.Nursery, **limits: int) -> PrefetchQueue:
    return PrefetchQueue(Scheduler(Limits(**{"unurgent_connections": 3, **limits})), nursery)


Clock = trio.testing.MockClock


async def test_a_plan_is_worked_through_and_its_event_set(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead, fetcher = _ahead(nursery), FakeFetcher()
    done = ahead.add(_real(fetcher), Plan(range(10)), PREFETCH)
    assert (ahead.pending(), ahead.has(_real(fetcher), PREFETCH)) == (1, True)
    await done.wait()
    assert sorted(map(int, fetcher.log)) == list(range(10))
    assert (ahead.pending(), ahead.has(_real(fetcher), PREFETCH)) == (0, False)
    assert trio.current_time() == pytest.approx(4)  # three at once
    await trio.testing.wait_all_tasks_blocked()
    assert not nursery.child_tasks  # nobody stays
    await ahead.add(_real(fetcher), Plan([5]), PREFETCH).wait()
    assert len(fetcher.log) == 11


async def test_an_empty_plan_is_done_at_once(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    ahead = _ahead(nursery)
    assert ahead.add(_real(FakeFetcher()), Plan(()), PREFETCH).is_set()
    assert ahead.pending() == 0


async def test_what_is_needed_first_is_fetched_first(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery, unurgent_connections=1)
    log: list[str] = []
    one, two = FakeFetcher(name="a", log=log), FakeFetcher(name="b", log=log)
    rest = ahead.add(_real(one), Plan(range(9)), BACKGROUND, delay_seconds=0.5)
    plans = [
        ahead.add(_real(one), Plan([1, 2, 3], wanted_at=[10, 30, 50]), PREFETCH),
        ahead.add(_real(two), Plan([1, 2, 3], wanted_at=[20, 40]), PREFETCH),
    ]
    for done in plans:
        await done.wait()
    assert log == ["a1", "b1", "a2", "b2", "a3", "b3"]  # what has no time comes last
    await rest.wait()
    assert log[6:] == [f"a{n}" for n in range(9)]


async def test_prefetch_begins_while_background_is_under_way(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery)
    slow, urgent = FakeFetcher(), FakeFetcher()
    slow.seconds = 100
    ahead.add(_real(slow), Plan(range(1000)), BACKGROUND)
    await trio.sleep(150)
    begun = trio.current_time()
    await ahead.add(_real(urgent), Plan([1, 2]), PREFETCH).wait()
    assert trio.current_time() - begun < 3
    nursery.cancel_scope.cancel()


async def test_a_host_that_does_not_answer_keeps_no_other_waiting(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery)
    for _ in range(100):
        dead = FakeFetcher("dead")
        dead.seconds = 30
        dead.fault = lambda: RegistryUnreachable("away")
        ahead.add(_real(dead), Plan(range(10)), PREFETCH)
    await trio.sleep(1)
    begun = trio.current_time()
    await ahead.add(_real(FakeFetcher("alive")), Plan(range(30)), PREFETCH).wait()
    assert trio.current_time() - begun <= 11
    nursery.cancel_scope.cancel()


async def test_pauses_grow_and_the_work_goes_on_after_an_outage(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery, unurgent_connections=1)
    outage = 1000.0
    fetchers = [FakeFetcher() for _ in range(20)]
    for fetcher in fetchers:
        fetcher.seconds = 0.1
        fetcher.fault = lambda: (
            RegistryUnreachable("away") if trio.current_time() < outage else None
        )
    done = [ahead.add(_real(each), Plan(range(3)), PREFETCH) for each in fetchers]
    for event in done:
        await event.wait()
    times = sorted(when for each in fetchers for when in each.times if when < outage)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    # The host as a whole is left alone, however many layers it has.
    assert pauses[:5] == pytest.approx([1.1, 2.1, 5.1, 15.1, 60.1])
    assert len(times) < 25
    assert trio.current_time() < outage + 120
    assert all(sorted(map(int, each.log)) == [0, 1, 2] for each in fetchers)


async def test_one_layer_that_cannot_be_had_does_not_hold_up_the_others(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery)
    gone = FakeFetcher()
    gone.fault = lambda: RegistryNotFound("no such blob")
    ahead.add(_real(gone), Plan(range(10)), PREFETCH)
    await trio.sleep(10)
    begun = trio.current_time()
    await ahead.add(_real(FakeFetcher()), Plan(range(9)), PREFETCH).wait()
    assert trio.current_time() - begun < 8
    count = len(gone.times)
    await trio.sleep(600)
    assert 5 <= len(gone.times) - count <= 40
    nursery.cancel_scope.cancel()


async def test_concurrent_failures_are_one_failure(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead, fetcher = _ahead(nursery), FakeFetcher()
    fetcher.fault = lambda: RegistryNotFound("x") if trio.current_time() < 1.5 else None
    await ahead.add(_real(fetcher), Plan(range(3)), PREFETCH).wait()
    assert trio.current_time() == pytest.approx(3)  # a second of work, of pause, and of work


async def test_a_delayed_plan_waits(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    ahead, fetcher = _ahead(nursery), FakeFetcher()
    await ahead.add(_real(fetcher), Plan([1]), BACKGROUND, delay_seconds=10).wait()
    assert fetcher.times == [10]


async def test_a_dropped_plan_ends(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    ahead, fetcher, other = _ahead(nursery), FakeFetcher(), FakeFetcher()
    failing = FakeFetcher()
    failing.fault = lambda: RegistryNotFound("x")
    dropped = [
        ahead.add(_real(fetcher), Plan(range(1000)), PREFETCH),
        ahead.add(_real(fetcher), Plan(range(1000)), BACKGROUND),
        ahead.add(_real(failing), Plan(range(1000)), PREFETCH),
    ]
    kept = ahead.add(_real(other), Plan(range(5)), PREFETCH)
    await trio.sleep(2.5)
    ahead.drop(_real(fetcher))
    ahead.drop(_real(failing))
    assert all(event.is_set() for event in dropped)
    await kept.wait()
    await trio.sleep(10)
    assert max(fetcher.times) <= 2.5
    assert ahead.pending() == 0
    assert not nursery.child_tasks


async def test_a_bug_in_one_layer_ends_its_plan_only(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead, broken, other = _ahead(nursery), FakeFetcher(), FakeFetcher()

    def bug() -> LazysnapError | None:
        raise ZeroDivisionError

    broken.fault = bug
    done = [ahead.add(_real(each), Plan(range(5)), PREFETCH) for each in (broken, other)]
    for event in done:
        await event.wait()
    assert len(other.log) == 5


class _Counter(trio.abc.Instrument):
    """Counts how often any task runs."""

    steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1


async def test_nothing_runs_while_there_is_nothing_to_do(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery)
    failing = FakeFetcher()
    failing.seconds = 0
    failing.fault = lambda: RegistryUnreachable("away")
    hanging = FakeFetcher("other")
    hanging.seconds = float("inf")
    for _ in range(50):
        ahead.add(_real(failing), Plan(range(100)), PREFETCH)
        ahead.add(_real(failing), Plan(range(100)), BACKGROUND, delay_seconds=50)
    ahead.add(_real(hanging), Plan([1]), BACKGROUND)
    counter = _Counter()
    trio.lowlevel.add_instrument(counter)
    await trio.sleep(3600)
    trio.lowlevel.remove_instrument(counter)
    assert counter.steps < 5000
    nursery.cancel_scope.cancel()


async def test_others_run_while_a_plan_is_all_there_already(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    class Present(FakeFetcher):
        async def fetch_ahead(self, plan: Plan, ticket: Ticket) -> None:
            plan.position += 1  # nothing to wait for

    ahead = _ahead(nursery, unurgent_connections=1)
    plan = Plan(range(2000))
    done = ahead.add(_real(Present()), plan, BACKGROUND)
    seen = set()
    while not done.is_set():
        await trio.lowlevel.checkpoint()
        seen.add(plan.position)
    assert len(seen) > 1000


async def test_hundreds_of_plans_are_taken_up_quickly(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    ahead = _ahead(nursery)
    log: list[str] = []
    done = []
    for n in range(500):
        fetcher = FakeFetcher(name=f"{n}.", log=log)
        done.append(ahead.add(_real(fetcher), Plan(range(2)), BACKGROUND))
    assert len(nursery.child_tasks) == 2  # tasks are for requests, not for layers
    for event in done:
        await event.wait()
    assert len(log) == 1000
