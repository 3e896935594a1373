# SPDX-License-Identifier: Apache-2.0
"""Patience, by a clock that does not wait."""

from __future__ import annotations

import email.utils
import time

import pytest
import trio
import trio.testing

from lazysnap.errors import RegistryUnreachable
from lazysnap.registry.retry import Backoff, Fault, parse_retry_after


async def test_waits_grow_and_end(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Backoff("blob x of host", 30, 10)
    start, waits = trio.current_time(), []
    with pytest.raises(RegistryUnreachable, match=r"blob x of host.*30 s.*the cause"):
        while True:
            before = trio.current_time()
            await backoff.pause(Fault("the cause"))
            waits.append(trio.current_time() - before)
    assert 20 < trio.current_time() - start <= 30
    assert waits[0] <= 0.05
    assert max(waits) <= 5
    assert 8 <= len(waits) <= 30


async def test_a_server_that_asks_for_no_wait_is_not_flooded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    backoff = Backoff("x", 30, 10)
    with pytest.raises(RegistryUnreachable):
        for _ in range(100):
            await backoff.pause(Fault("y", retry_after=0))
    assert backoff.retries <= 30


async def test_a_server_that_says_when_is_asked_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    backoff = Backoff("x", 30, 10)
    for _ in range(10):
        before = trio.current_time()
        await backoff.pause(Fault("y", retry_after=2))
        assert trio.current_time() - before == pytest.approx(2)


async def test_one_wait_that_a_server_asks_for_is_given_also_if_there_is_little_patience(
    autojump_clock: trio.testing.MockClock,
) -> None:
    backoff = Backoff("x", 5, 10, later=30)
    await backoff.pause(Fault("y", retry_after=6))
    assert backoff.deadline > trio.current_time()
    with pytest.raises(RegistryUnreachable):
        await backoff.pause(Fault("y", retry_after=6))


async def test_progress_starts_the_time_again(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Backoff("x", 10, 10)
    for _ in range(100):
        await backoff.pause(Fault("y", retry_after=5))
        backoff.progress(64 << 10)


async def test_a_byte_at_a_time_is_no_progress(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Backoff("x", 10, 10)
    with pytest.raises(RegistryUnreachable):
        for _ in range(100):
            await backoff.pause(Fault("y", retry_after=5))
            backoff.progress(1)


async def test_time_of_others_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Backoff("x", 10, 10)
    await backoff.pause(Fault("y", retry_after=5))
    backoff.hold()
    await trio.sleep(1000)
    backoff.release()
    await backoff.pause(Fault("y", retry_after=4))
    with pytest.raises(RegistryUnreachable):
        await backoff.pause(Fault("y", retry_after=4))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("", None), ("0", 0), (" 7 ", 7), ("-1", None), ("1.5", None), ("x" * 99, None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("9" * 400, None), ("\u0663", None)],
)  # fmt: skip
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    seconds = parse_retry_after(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert seconds is not None
    assert 95 < seconds <= 101
