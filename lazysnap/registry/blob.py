# SPDX-License-Identifier: Apache-2.0
"""Ranges of one blob in a registry.

A `RemoteBlob` remembers where the registry redirected to and goes straight there, until that says
the URL is no longer good. How a stream goes on after a broken connection is told in `stream`.

What is handed out is at the offsets that were asked for, or it raises: the position of every body
is checked by its Content-Range. Whether the bytes are the right ones is for digests to say, which
this module does not check.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from lazysnap import tracing
from lazysnap.digest import Digest
from lazysnap.errors import InvalidArgument, RangesUnsupported, RegistryError
from lazysnap.reference import Reference
from lazysnap.registry.exchange import REDIRECTS, Call, Exchange, Target
from lazysnap.registry.retry import Backoff, Fault
from lazysnap.registry.stream import RangeReader
from lazysnap.registry.transport import Answer

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)
_UNSATISFIED = re.compile(r"bytes \*/([0-9]{1,18})", re.ASCII)
_RANGE_STATUSES = frozenset({200, 206, 416})
_SUFFIX_STATUSES = _RANGE_STATUSES | {400, 405, 501}
"""Servers that do not know `bytes=-n` answer one of the last three."""
_WHOLE_FACTOR = 4
"""A whole body in place of its tail is taken if it is at most this many times as long."""


@dataclass(frozen=True)
class Tail:
    """The end of a blob.

    Attributes:
        data: its last bytes; all of it when it is shorter than was asked for.
        size: of the whole blob, in bytes.
    """

    data: bytes
    size: int


@dataclass(frozen=True)
class _Part:
    """Where in the blob a body lies: bytes `start` to `stop` (exclusive) of `size`."""

    start: int
    stop: int
    size: int | None


class RemoteBlob:
    """One blob of a registry, read in parts.

    Args:
        exchange: the client's way to send requests.
        reference: any reference of the repository that holds it.
        digest: its digest.
        size: in bytes, if a manifest has told it.
        hurried, checked: as for `Registry.blob`.
    """

    def __init__(
        self,
        exchange: Exchange,
        reference: Reference,
        digest: Digest,
        size: int | None,
        *,
        hurried: bool = False,
        checked: bool = True,
    ) -> None:
        self.reference = reference
        self.digest = digest
        self._exchange = exchange
        self._size = size
        self._target: Target | None = None
        self._last_success: float | None = None
        self._hurried = hurried
        self._call = Call(
            reference,
            f"blobs/{digest}",
            f"blob {digest}",
            accept=_RANGE_STATUSES,
            checked=checked,
        )

    @property
    def size(self) -> int | None:
        """Size in bytes; None until it was given or learned."""
        return self._size

    @property
    def last_success(self) -> float | None:
        """When bytes last arrived, by time.monotonic(); None if never."""
        return self._last_success

    async def tail(self, length: int) -> Tail:
        """The last `length` bytes and the size, in one round trip with most servers.

        Raises:
            RangesUnsupported: the server sends whole blobs only, and this one is not small.
            RegistryError: or one of its kinds.
        """
        if length <= 0:
            raise InvalidArgument("the tail of a blob must have at least one byte")
        if self._size is None:
            found = await self._speculative_tail(length)
            if found is not None:
                return found
        if self._size is None:
            await self._find_size()
        size = self._size
        assert size is not None
        start = max(0, size - length)
        return Tail(await self.read(start, size - start), size)

    async def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from offset `start`.

        Raises:
            InvalidArgument: the range is not within the blob.
            RangesUnsupported: the server sends whole blobs only.
            RegistryError: or one of its kinds.
        """
        async with self.read_stream(start, length) as reader:
            pieces = [piece async for piece in reader]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_stream(self, start: int, length: int) -> RangeReader:
        """Exactly `length` bytes from offset `start`, in pieces as they arrive.

        Returns:
            An async context manager that is its own async iterator of bytes.
        """
        return RangeReader(self, start, length, whole=False)

    def whole_stream(self, start: int = 0) -> RangeReader:
        """All bytes from offset `start`, also from servers that know no ranges.

        The size must be known.
        """
        if self._size is None:
            raise InvalidArgument(f"the size of blob {self.digest} is not known")
        return RangeReader(self, start, self._size - start, whole=True)

    async def probe(self, seconds: float | None = None) -> None:
        """Check that bytes can be had, renewing the login and the redirect where needed.

        Args:
            seconds: how long to try, if not as long as the settings say.

        Raises:
            RegistryError: or one of its kinds; they cannot be had.
        """
        backoff = self.backoff(seconds)
        async with await self.request("bytes=0-0", backoff) as answer:
            await answer.drain(limit=4096)
        self.note_success()

    def backoff(self, seconds: float | None = None) -> Backoff:
        """The patience for one operation on this blob."""
        what = f"blob {self.digest} of {self.reference.host}/{self.reference.repository}"
        return self._exchange.backoff(
            what, seconds, reference=self.reference, hurried=self._hurried
        )

    def note_success(self) -> None:
        """Remember that the registry works."""
        self._last_success = time.monotonic()

    def forget_target(self, url: str) -> None:
        """Ask the registry again, as the place that it redirected to has failed."""
        if self._target is not None and self._target.url == url:
            self._target = None

    async def request(
        self, range_value: str | None, backoff: Backoff, accept: frozenset[int] = _RANGE_STATUSES
    ) -> Answer:
        """Ask for a range, from where the last answer came from if that is elsewhere."""
        with tracing.span("blob request", layer=self.digest, range=range_value or "all"):
            return await self._request(range_value, backoff, accept)

    async def _request(
        self, range_value: str | None, backoff: Backoff, accept: frozenset[int]
    ) -> Answer:
        headers = {"Range": range_value} if range_value else {}
        call = replace(self._call, headers=headers, accept=accept)
        target = self._target
        while target is not None:
            try:
                answer = await self._exchange.direct(call, target, backoff)
                if not _is_stale(answer):
                    return await self._exchange.judge(call, answer)
                await answer.drain()
                self.forget_target(target.url)
                break
            except Fault as fault:
                self.forget_target(target.url)
                await backoff.pause(fault)
                target = self._target
        answer, self._target = await self._exchange.open(call, backoff)
        return answer

    async def open_part(
        self, start: int, stop: int, backoff: Backoff, *, whole: bool
    ) -> tuple[Answer, int, int]:
        """Open bytes `start` to `stop` (exclusive).

        Args:
            start: first byte.
            stop: byte after the last.
            backoff: the patience of the operation.
            whole: a body that begins at 0 will do, as all is wanted in the end.

        Returns:
            The answer, how many bytes to skip in it, and where it ends in the blob.
        """
        value = None if whole and start == 0 else f"bytes={start}-{stop - 1}"
        answer = await self.request(value, backoff)
        try:
            if answer.status == 206:
                part = self._part(answer)
                if part is None or part.start != start or not start < part.stop <= stop:
                    raise self._no_ranges(answer, f"{value} is answered with another range")
                return answer, 0, part.stop
            if answer.status == 416:
                raise RegistryError(
                    f"{answer.url_host} says that {self._name} does not have {value}"
                )
            self._learn_size(answer, answer.length)
            if whole or (start == 0 and answer.length == stop):
                return answer, start, stop
            raise self._no_ranges(answer, f"{value} is answered with the whole blob")
        except BaseException:
            await answer.aclose()
            raise

    async def _speculative_tail(self, length: int) -> Tail | None:
        """The tail by a suffix range; None if the server does not know those."""
        backoff = self.backoff()
        while True:
            answer = await self.request(f"bytes=-{length}", backoff, _SUFFIX_STATUSES)
            try:
                async with answer:
                    found = await self._take_tail(answer, length)
                backoff.works()
                return found
            except Fault as fault:
                self.forget_target(answer.url)
                await backoff.pause(fault)

    async def _take_tail(self, answer: Answer, length: int) -> Tail | None:
        if answer.status == 206:
            part = self._part(answer)
            if part is None or part.size is None or part.stop != part.size:
                return None  # Some servers read -n as 0-n.
            if part.stop - part.start != min(length, part.size):
                return None
            return self._tail(answer, await answer.read(length), part.size - part.start, part.size)
        if answer.status == 200:
            size = answer.length
            if size is None:
                return None
            self._learn_size(answer, size)
            if size <= _WHOLE_FACTOR * length:
                return self._tail(answer, (await answer.read(size))[-length:], None, size)
            return None
        unsatisfied = _UNSATISFIED.fullmatch(answer.headers.get("content-range", ""))
        if answer.status == 416 and unsatisfied and int(unsatisfied[1]) == 0:
            self._learn_size(answer, 0)
            return Tail(b"", 0)
        return None

    def _tail(self, answer: Answer, data: bytes, expected: int | None, size: int) -> Tail:
        if expected is not None and len(data) != expected:
            raise Fault(f"{answer.url_host} ended the answer early")
        self.note_success()
        return Tail(data, size)

    async def _find_size(self) -> None:
        """Learn the size from the answer to a one-byte range."""
        async with await self.request("bytes=0-0", self.backoff()) as answer:
            if answer.status == 206:
                self._part(answer)
            elif answer.status == 200:
                self._learn_size(answer, answer.length)
            else:
                unsatisfied = _UNSATISFIED.fullmatch(answer.headers.get("content-range", ""))
                self._learn_size(answer, int(unsatisfied[1]) if unsatisfied else None)
            await answer.drain(limit=4096)
            if self._size is None:
                raise self._no_ranges(answer, "the size of the blob cannot be found")

    def _part(self, answer: Answer) -> _Part | None:
        """The Content-Range of a 206, if it has one; learns the size from it."""
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", "").strip())
        if match is None:
            return None
        size = None if match[3] == "*" else int(match[3])
        part = _Part(int(match[1]), int(match[2]) + 1, size)
        if part.start >= part.stop or (size is not None and part.stop > size):
            return None
        self._learn_size(answer, size)
        return part

    def _learn_size(self, answer: Answer, size: int | None) -> None:
        """Take a size that a server tells, which must agree with what is known.

        Raises:
            RegistryError: it does not, or the body is encoded, so that sizes mean nothing.
        """
        encoding = answer.headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise RegistryError(
                f"{answer.url_host} sends {self._name} encoded as {encoding[:40]!r}"
            )
        if size is None:
            return
        if self._size is not None and self._size != size:
            raise RegistryError(
                f"{answer.url_host}: {self._name} has {size} bytes, expected {self._size}"
            )
        self._size = size

    def _no_ranges(self, answer: Answer, why: str) -> RangesUnsupported:
        return RangesUnsupported(
            f"{answer.url_host} cannot serve parts of {self._name}: {why}",
            hint="lazy reading needs a registry or mirror that supports Range requests",
        )

    @property
    def _name(self) -> str:
        return f"blob {self.digest}"


def _is_stale(answer: Answer) -> bool:
    """Whether a remembered place no longer serves the blob: an expired signature, most often."""
    status = answer.status
    return status in REDIRECTS or (400 <= status < 500 and status not in (408, 416, 425, 429))
