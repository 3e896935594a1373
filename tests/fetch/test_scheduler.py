# SPDX-License-Identifier: Apache-2.0
"""Who fetches when, and how fast; in the time of trio's mock clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
import trio.testing

from lazysnap.fetch.scheduler import Host, Limits, Priority, Scheduler

DEMAND, PREFETCH, BACKGROUND = Priority
PIECE = 64 << 10


async def _settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


class Requests:
    """Requests that hold their tickets until they are told to end."""

    def __init__(self, scheduler: Scheduler, nursery: trio.Nursery) -> None:
        self.scheduler = scheduler
        self.nursery = nursery
        self.granted: list[str] = []
        self.most = 0
        self._ends: dict[str, trio.Event] = {}

    async def begin(self, name: str, priority: Priority, host: str = "h") -> trio.CancelScope:
        scope = trio.CancelScope()
        self._ends[name] = trio.Event()

        async def request() -> None:
            with scope:
                async with self.scheduler.ticket(host, priority):
                    self.granted.append(name)
                    self.most = max(self.most, len(self.scheduler.host(host).active))
                    await self._ends[name].wait()

        self.nursery.start_soon(request)
        await _settle()
        return scope

    def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()


async def test_order_is_demand_then_prefetch_then_background(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    requests = Requests(Scheduler(Limits(connections=1)), nursery)
    await requests.begin("first", DEMAND)
    for name, priority in [("b", BACKGROUND), ("p", PREFETCH), ("d1", DEMAND), ("d2", DEMAND)]:
        await requests.begin(name, priority)
    for name in ["first", "d1", "d2", "p"]:
        requests.end(name)
        await _settle()
    assert requests.granted == ["first", "d1", "d2", "p", "b"]
    assert requests.most == 1
    nursery.cancel_scope.cancel()


async def test_a_reader_gets_a_ticket_while_prefetch_holds_all_of_its_own(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    for connections, unurgent in [(16, 3), (4, 100), (2, 3)]:
        requests = Requests(Scheduler(Limits(connections, unurgent)), nursery)
        for n in range(5):
            await requests.begin(f"p{n}", PREFETCH)
        assert len(requests.granted) == min(unurgent, connections - 1)
        await requests.begin("d", DEMAND)
        assert requests.granted[-1] == "d"
    nursery.cancel_scope.cancel()


async def test_background_leaves_a_place_to_prefetch(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    requests = Requests(Scheduler(Limits(connections=16, unurgent_connections=3)), nursery)
    for n in range(5):
        await requests.begin(f"b{n}", BACKGROUND)
    assert requests.granted == ["b0", "b1"]
    await requests.begin("p", PREFETCH)
    assert requests.granted == ["b0", "b1", "p"]
    nursery.cancel_scope.cancel()


async def test_hosts_do_not_wait_for_each_other(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    requests = Requests(Scheduler(Limits(connections=1)), nursery)
    await requests.begin("a", DEMAND, host="a")
    await requests.begin("b", DEMAND, host="b")
    assert requests.granted == ["a", "b"]
    nursery.cancel_scope.cancel()


async def test_tickets_that_end_together_are_all_given_on(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    for _ in range(20):  # trio runs tasks in random order
        requests = Requests(Scheduler(Limits(connections=3)), nursery)
        for n in range(6):
            await requests.begin(str(n), DEMAND)
        requests.end("0", "1", "2")
        await _settle()
        assert sorted(requests.granted) == ["0", "1", "2", "3", "4", "5"]
        requests.end("3", "4", "5")
        await _settle()
    nursery.cancel_scope.cancel()


async def test_a_waiter_that_is_cancelled_as_its_turn_comes_leaves_no_one_asleep(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    for late in (False, True):
        for _ in range(10):
            scheduler = Scheduler(Limits(connections=1))
            requests = Requests(scheduler, nursery)
            await requests.begin("holder", DEMAND)
            scope = await requests.begin("cancelled", DEMAND)
            await requests.begin("next", DEMAND)
            if late:
                requests.end("holder")
                scope.cancel()
            else:
                scope.cancel()
                requests.end("holder")
            await _settle()
            assert requests.granted[-1] == "next"
            requests.end("next", "cancelled")
            await _settle()
            host = scheduler.host("h")
            assert (host.active, host.waiting, host.arriving) == ([], [], 0)
    nursery.cancel_scope.cancel()


async def test_a_failing_body_gives_its_ticket_back(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(Limits(connections=1))
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            async with scheduler.ticket("h", DEMAND) as ticket:
                await ticket.received(10)
                raise ValueError("broken")
    assert scheduler.host("h").arriving == 0


@pytest.mark.parametrize("limits", [Limits(0, 0), Limits(-1, -1), Limits(1, 3)])
async def test_odd_limits_still_let_everything_through(
    limits: Limits, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler(limits)
    with trio.fail_after(10):
        for priority in Priority:
            async with scheduler.ticket("h", priority):
                pass


async def test_boosting_frees_the_place_of_an_unurgent_request(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler(Limits(connections=4, unurgent_connections=1))
    requests = Requests(scheduler, nursery)
    await requests.begin("p1", PREFETCH)
    await requests.begin("p2", PREFETCH)
    assert requests.granted == ["p1"]
    scheduler.host("h").active[0].boost(DEMAND)
    await _settle()
    assert requests.granted == ["p1", "p2"]
    nursery.cancel_scope.cancel()


async def test_steady_reads_do_not_starve_what_is_not_urgent(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler(Limits(connections=2))
    begun = trio.current_time()
    granted: list[float] = []

    async def reads() -> None:
        while True:
            async with scheduler.ticket("h", DEMAND):
                await trio.sleep(0.01)

    async def background() -> None:
        async with scheduler.ticket("h", BACKGROUND):
            granted.append(trio.current_time() - begun)

    for _ in range(8):
        nursery.start_soon(reads)
    await trio.sleep(0.001)
    nursery.start_soon(background)
    await trio.sleep(3)
    assert granted
    assert granted[0] >= 0.9  # but reads go first
    nursery.cancel_scope.cancel()


async def _stream(
    scheduler: Scheduler,
    priority: Priority,
    pieces: int,
    *,
    seconds: float = 0.0,
    size: int = PIECE,
    note: Callable[[], None] = lambda: None,
    round_trip: float = 0.0,
) -> None:
    async with scheduler.ticket("h", priority) as ticket:
        await trio.sleep(round_trip)
        for n in range(pieces):
            if n:
                await trio.sleep(seconds)
            await ticket.received(size)
            note()


async def test_unurgent_streams_hold_still_while_a_reader_receives(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler()
    moments: list[float] = []
    nursery.start_soon(
        lambda: _stream(
            scheduler,
            BACKGROUND,
            100,
            seconds=0.001,
            note=lambda: moments.append(trio.current_time()),
        )
    )
    await trio.sleep(0.0105)
    before = len(moments)
    assert before >= 10
    await _stream(scheduler, DEMAND, 1000, seconds=0.001)
    during = len(moments) - before
    assert 1 <= during <= 12  # a share that keeps it alive, not the thousand that there is time for
    await trio.sleep(0.2)
    assert len(moments) == 100  # goes on at once when the reader is done
    nursery.cancel_scope.cancel()


async def test_on_a_slow_link_the_share_of_what_is_not_urgent_is_small(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler()
    scheduler.host("h").bandwidth = 1e6
    got = 0

    def note() -> None:
        nonlocal got
        got += PIECE

    nursery.start_soon(lambda: _stream(scheduler, PREFETCH, 10_000, note=note))
    nursery.start_soon(lambda: _stream(scheduler, PREFETCH, 10_000, note=note))

    async with scheduler.ticket("h", DEMAND) as ticket:
        await ticket.received(1)
        begun, got = trio.current_time(), 0
        while trio.current_time() - begun < 20:
            await trio.sleep(0.1)
            await ticket.received(100_000)
    assert 0.3 * 0.1 * 20e6 < got < 1.5 * 0.1 * 20e6
    nursery.cancel_scope.cancel()


async def test_a_boosted_stream_goes_on_at_once(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler()
    scheduler.host("h").bandwidth = 1e5  # long holds
    moments: list[float] = []
    nursery.start_soon(
        lambda: _stream(
            scheduler, PREFETCH, 3, seconds=0.01, note=lambda: moments.append(trio.current_time())
        )
    )
    await _settle()
    (ticket,) = scheduler.host("h").active
    async with scheduler.ticket("h", DEMAND) as other:
        await other.received(1)
        await trio.sleep(0.05)
        held = len(moments)
        ticket.boost(DEMAND)
        await trio.sleep(0.05)
        assert held < 3
        assert len(moments) == 3
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("which", ["total", "host"])
async def test_byte_limits_hold_on_average_and_bursts_are_bounded(
    which: str, autojump_clock: trio.testing.MockClock
) -> None:
    rate = 1_000_000
    limits = Limits(**{"bytes_per_second" if which == "total" else "host_bytes_per_second": rate})
    scheduler = Scheduler(limits)
    passed: list[tuple[float, int]] = []
    begun = trio.current_time()

    def note() -> None:
        passed.append((trio.current_time() - begun, PIECE))

    async with trio.open_nursery() as nursery:
        for priority in [DEMAND, DEMAND, PREFETCH, BACKGROUND]:
            nursery.start_soon(lambda p=priority: _stream(scheduler, p, 50, note=note))
    total = sum(size for _, size in passed)
    seconds = passed[-1][0]
    assert total / seconds == pytest.approx(rate, rel=0.05)
    # In no second does more pass than the limit, the burst, and one piece of each stream.
    for start, _ in passed:
        within = sum(size for when, size in passed if start <= when <= start + 1)
        assert within <= rate * 1.1 + 5 * PIECE


async def test_a_burst_after_idling_is_a_tenth_of_a_second(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler(Limits(bytes_per_second=1_000_000))
    await trio.sleep(100)
    begun = trio.current_time()
    await _stream(scheduler, DEMAND, 200, size=10_000)
    assert trio.current_time() - begun == pytest.approx(1.9, abs=0.02)


async def test_under_a_limit_a_reader_waits_for_one_unurgent_piece_at_most(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    rate = 1_000_000
    scheduler = Scheduler(Limits(bytes_per_second=rate))
    for _ in range(3):
        nursery.start_soon(lambda: _stream(scheduler, PREFETCH, 10_000))
    await trio.sleep(5.03)
    begun = trio.current_time()
    await _stream(scheduler, DEMAND, 1)
    assert trio.current_time() - begun <= 2 * PIECE / rate + 1e-6
    nursery.cancel_scope.cancel()


async def test_hosts_have_limits_of_their_own(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(Limits(host_bytes_per_second=1_000_000))
    begun = trio.current_time()

    async def fetch(host: str) -> None:
        async with scheduler.ticket(host, DEMAND) as ticket:
            for _ in range(10):
                await ticket.received(100_000)

    async with trio.open_nursery() as nursery:
        for host in "abc":
            nursery.start_soon(fetch, host)
    assert trio.current_time() - begun == pytest.approx(0.9, abs=0.11)


# Estimates.


async def _measured(pieces: int, seconds: float, *, size: int = PIECE, times: int = 1) -> Host:
    scheduler = Scheduler()
    for _ in range(times):
        await _stream(scheduler, DEMAND, pieces, seconds=seconds, size=size, round_trip=0.03)
    return scheduler.host("h")


async def test_bandwidth_and_round_trip_are_measured(
    autojump_clock: trio.testing.MockClock,
) -> None:
    host = await _measured(100, 0.01)
    assert host.round_trip == pytest.approx(0.03)
    assert host.bandwidth == pytest.approx(PIECE / 0.01, rel=0.01)
    assert host.product() == pytest.approx(0.03 * PIECE / 0.01, rel=0.01)


async def test_tiny_answers_say_nothing_of_the_bandwidth(
    autojump_clock: trio.testing.MockClock,
) -> None:
    host = await _measured(1, 0.0, size=5000, times=1000)
    assert host.bandwidth == 0
    assert host.round_trip == pytest.approx(0.03)


async def test_instantaneous_answers_are_no_division_by_zero(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scheduler = Scheduler()
    for _ in range(10):
        await _stream(scheduler, DEMAND, 100)
    host = scheduler.host("h")
    assert math.isfinite(host.bandwidth)
    assert host.product() == 0


async def test_pauses_between_answers_are_not_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scheduler = Scheduler()
    for _ in range(50):
        await _stream(scheduler, DEMAND, 10, seconds=0.01, round_trip=0.03)
        await trio.sleep(100)
    assert scheduler.host("h").bandwidth == pytest.approx(PIECE / 0.01, rel=0.01)


async def test_streams_at_once_share_the_bandwidth_that_is_measured(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scheduler = Scheduler()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(lambda: _stream(scheduler, DEMAND, 100, seconds=0.04))
    assert scheduler.host("h").bandwidth == pytest.approx(PIECE / 0.01, rel=0.05)


async def test_a_longer_way_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler()
    await _stream(scheduler, DEMAND, 1, round_trip=0.01)
    for _ in range(100):
        await _stream(scheduler, DEMAND, 1, round_trip=0.1)
    assert scheduler.host("h").round_trip == pytest.approx(0.1)


async def test_a_ticket_counts_from_when_it_was_granted(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scheduler = Scheduler(Limits(connections=1))
    async with trio.open_nursery() as both:
        for _ in range(2):
            both.start_soon(lambda: _stream(scheduler, DEMAND, 2, seconds=5, round_trip=0.02))
    assert scheduler.host("h").round_trip <= 0.021


def test_background_has_fewer_places_than_prefetch() -> None:
    for unurgent, background, expected in [(6, 2, 2), (6, 9, 5), (2, 2, 1), (1, 1, 1)]:
        limits = Limits(unurgent_connections=unurgent, background_connections=background)
        scheduler = Scheduler(limits)
        assert scheduler.most(PREFETCH) == unurgent
        assert scheduler.most(BACKGROUND) == expected


@pytest.mark.parametrize(("decoders", "most"), [(1, 1), (2, 1), (4, 3), (100, 4)])
def test_what_nobody_waits_for_leaves_a_decoding_thread_to_readers(
    monkeypatch: pytest.MonkeyPatch, decoders: int, most: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    scheduler = Scheduler()
    scheduler.leave_to_readers(decoders)
    assert scheduler.leisure.total_tokens == most
