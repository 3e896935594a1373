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

import trio

from lazysnap.errors import RegistryUnreachable

_FIRST_WAIT = 0.05
_LONGEST_WAIT = 5.0
_PROGRESS = 64 << 10


class Fault(Exception):
    """A failure that trying again may cure.

    Args:
        cause: what happened, for people.
        retry_after: seconds the server asked us to wait.
        cut_short: there was too little time left for an answer, which explains nothing.
    """

    def __init__(
        self, cause: str, retry_after: float | None = None, *, cut_short: bool = False
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.retry_after = retry_after
        self.cut_short = cut_short


class Backoff:
    """The patience of one operation.

    Args:
        what: the operation's object and host, for the error message.
        seconds: time without progress after which it fails.
        longest_retry_after: upper limit for what a server can ask for, in seconds.
    """

    def __init__(self, what: str, seconds: float, longest_retry_after: float) -> None:
        self.what = what
        self.retries = 0
        self._seconds = seconds
        self._longest_retry_after = longest_retry_after
        self._wait = _FIRST_WAIT
        self._received = 0
        self._deadline = trio.current_time() + seconds
        self._last: Fault | None = None
        self._repeating = False
        self._held: float | None = None

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
            self._deadline = trio.current_time() + self._seconds

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
            RegistryUnreachable: the wait would not end in time.
        """
        if self._last is None or not fault.cut_short:
            self._last = fault
        if fault.retry_after:
            seconds = min(fault.retry_after, self._longest_retry_after)
        else:
            # Also if it is 0, as some servers always say: who obeys them floods them.
            seconds = self._wait * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, no secret
            self._wait = min(self._wait * 2, _LONGEST_WAIT)
        if trio.current_time() + seconds >= self._deadline:
            raise self.exhausted() from fault
        self.retries += 1
        self._repeating = True
        await trio.sleep(seconds)

    def exhausted(self) -> RegistryUnreachable:
        """The error for an operation that used up its time."""
        cause = self._last.cause if self._last else "no answer"
        return RegistryUnreachable(
            f"{self.what}: gave up after {self._seconds:g} s and {self.retries} retries: {cause}",
            hint="check that the registry is up and can be reached from this machine",
        )


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3), or None if it says nothing."""
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
