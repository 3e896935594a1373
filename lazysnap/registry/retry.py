# SPDX-License-Identifier: Apache-2.0
"""When to try again, and when to give up.

A `Fault` is a failure that trying again may cure. It never leaves the package: `Backoff` turns the
last one into `RegistryUnreachable` when the time is used up. The time starts again whenever enough
bytes have arrived, so that a long download over a bad line ends, and a server that hands out a
single byte per connection does not keep us for ever.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from lazysnap.errors import RegistryUnreachable
from lazysnap.registry.outages import Outlook

_FIRST_WAIT = 0.05
_FIRST_TRY = 2.0
"""Seconds for an attempt behind the first wait that a server has asked for."""
_LONGEST_WAIT = 5.0
_PROGRESS = 64 << 10
_DATE_MOST = 64
_DOCUMENT_RATE = 64 << 10
_CHECK = "check that the registry is up and can be reached from this machine"


class Fault(Exception):
    """A failure that trying again may cure.

    Args:
        cause: what happened, for people.
        retry_after: seconds the server asked us to wait.
        cut_short: there was too little time left for an answer, which explains nothing.
        unreachable: host and port of the server, if there is no connection to it; otherwise empty.
    """

    def __init__(
        self,
        cause: str,
        retry_after: float | None = None,
        *,
        cut_short: bool = False,
        unreachable: str = "",
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.retry_after = retry_after
        self.cut_short = cut_short
        self.unreachable = unreachable


class Backoff:
    """The patience of one operation.

    Args:
        what: the operation's object and host, for the error message.
        seconds: time without progress after which it fails.
        longest_retry_after: upper limit for what a server can ask for, in seconds.
        outlook: what other operations know of the server, and are told.
        later: seconds that count in place of `seconds` once something has arrived.
    """

    def __init__(
        self,
        what: str,
        seconds: float,
        longest_retry_after: float,
        outlook: Outlook | None = None,
        *,
        later: float | None = None,
    ) -> None:
        self.what = what
        self.retries = 0
        self._seconds = seconds
        self._later = seconds if later is None else later
        self._longest_retry_after = longest_retry_after
        self._wait = _FIRST_WAIT
        self._received = 0
        self._deadline = trio.current_time() + seconds
        self._last: Fault | None = None
        self._repeating = False
        self._held: float | None = None
        self._outlook = outlook

    @property
    def deadline(self) -> float:
        """The time, by trio's clock, at which this gives up."""
        return self._deadline

    def progress(self, received: int) -> None:
        """Note that so many bytes have arrived."""
        self._received += received
        if self._received >= _PROGRESS:
            self._received = 0
            self._wait = _FIRST_WAIT
            self._seconds = self._later
            self._deadline = trio.current_time() + self._seconds
            self.works()

    def reached(self) -> None:
        """Note that the server has answered something."""
        if self._outlook is not None:
            self._outlook.reached()

    def works(self) -> None:
        """Note that the server gives what it is asked for."""
        if self._outlook is not None:
            self._outlook.works()

    def hold(self) -> None:
        """Stop the clock, while it is others who take their time."""
        self._held = trio.current_time()

    def release(self) -> None:
        """Let the clock run again after `hold`."""
        if self._held is not None:
            self._deadline += trio.current_time() - self._held
            self._held = None

    def take_repeat(self) -> bool:
        """Whether the next request repeats a failed one; True once after each pause."""
        repeating, self._repeating = self._repeating, False
        return repeating

    async def pause(self, fault: Fault) -> None:
        """Wait before the next attempt.

        Raises:
            RegistryUnreachable: the wait would not end in time, or the server has already failed for as
                long as this operation would wait.
        """
        if self._last is None or not fault.cut_short:
            self._last = fault
        if fault.retry_after:
            seconds = min(fault.retry_after, self._longest_retry_after)
            if not self.retries:  # it asks to wait once, which is not the same as giving nothing
                self._deadline = max(self._deadline, trio.current_time() + seconds + _FIRST_TRY)
        else:
            # Also if it is 0, as some servers always say: who obeys them floods them.
            seconds = self._wait * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, no secret
            self._wait = min(self._wait * 2, _LONGEST_WAIT)
        outlook = self._outlook
        failing = outlook.failing_seconds() if outlook is not None else 0.0
        if failing >= self._seconds:
            self._give_up(fault)
            raise RegistryUnreachable(
                f"{self.what}: {fault.cause}; it has failed for {failing:.0f} s", hint=_CHECK
            ) from fault
        if trio.current_time() + seconds >= self._deadline:
            self._give_up(fault)
            raise self.exhausted() from fault
        self.retries += 1
        self._repeating = True
        await trio.sleep(seconds)

    def _give_up(self, fault: Fault) -> None:
        if self._outlook is not None:
            # Who gives up because the next wait would be too long has been as patient as it can.
            since = min(self._deadline, trio.current_time()) - self._seconds
            self._outlook.gave_up(since, fault.cause, fault.unreachable)

    def exhausted(self) -> RegistryUnreachable:
        """The error for an operation that used up its time."""
        cause = self._last.cause if self._last else "no answer"
        return RegistryUnreachable(
            f"{self.what}: gave up after {self._seconds:g} s and {self.retries} retries: {cause}",
            hint=_CHECK,
        )


@contextmanager
def time_limit(what: str, seconds: float) -> Iterator[None]:
    """Let the body of a `with` run for so many seconds.

    Args:
        what: the operation, for the error.
        seconds: from now on, all attempts and waits included.

    Raises:
        RegistryUnreachable: it did not end in time.
    """
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise RegistryUnreachable(
            f"{what}: gave up after {seconds:g} s, as it arrives too slowly", hint=_CHECK
        ) from None


def document_seconds(patience: float, size: int) -> float:
    """How long it may take to receive a document, all attempts included.

    Args:
        patience: how long an operation keeps trying without getting anywhere, in seconds.
        size: most bytes that it can have.
    """
    return patience + size / _DOCUMENT_RATE


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3), or None if it says nothing."""
    if not value:
        return None
    value = value.strip()
    if len(value) > _DATE_MOST:
        return None
    if value.isascii() and value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
