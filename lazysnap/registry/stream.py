# SPDX-License-Identifier: Apache-2.0
"""One unbroken stream of a blob's bytes, however often the connection breaks below it.

Knows neither HTTP headers nor where the bytes come from: it asks a `Source` for the part that is
still missing. It hands out exactly the bytes that were asked for, in order, or it raises. Whether
they are the right ones is for digests to say, which this module does not check.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from lazysnap.digest import Digest
from lazysnap.errors import InvalidArgument, RegistryError
from lazysnap.registry.retry import Backoff, Fault
from lazysnap.registry.transport import Answer


class Source(Protocol):
    """What a reader needs of a blob; `RemoteBlob` is the one there is."""

    digest: Digest

    @property
    def size(self) -> int | None:
        """Size in bytes, if it is known."""

    def backoff(self, seconds: float | None = None) -> Backoff:
        """The patience for one stream."""

    async def open_part(
        self, start: int, stop: int, backoff: Backoff, *, whole: bool
    ) -> tuple[Answer, int, int]:
        """Open bytes `start` to `stop`; see `RemoteBlob.open_part`."""

    def forget_target(self, url: str) -> None:
        """Note that the place at `url` has failed."""

    def note_success(self) -> None:
        """Note that bytes have arrived."""


class RangeReader:
    """Bytes of a blob as one stream that survives broken connections.

    Enter it before iterating. It has handed out exactly the bytes asked for when the iteration ends
    without an error. Not to be shared between tasks.
    """

    def __init__(self, blob: Source, start: int, length: int, *, whole: bool) -> None:
        if start < 0 or length < 0 or (blob.size is not None and start + length > blob.size):
            raise InvalidArgument(
                f"bytes {start} to {start + length} are not within blob {blob.digest}"
                f" of {blob.size} bytes"
            )
        self._blob = blob
        self._position = start
        self._end = start + length
        self._whole = whole
        self._answer: Answer | None = None
        self._skip = 0
        self._stop = start
        self._backoff = blob.backoff()
        self._backoff.hold()

    async def __aenter__(self) -> RangeReader:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    def __aiter__(self) -> RangeReader:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes, never empty.

        Raises:
            RegistryError: or one of its kinds; the stream cannot be continued.
        """
        self._backoff.release()
        while self._position < self._end:
            try:
                chunk = await self._receive()
            except Fault as fault:
                if self._answer is not None:
                    self._blob.forget_target(self._answer.url)
                await self._close()
                await self._backoff.pause(fault)
                continue
            if chunk:
                # A slow consumer must not use up the patience with the server.
                self._backoff.hold()
                return chunk
        await self._close()
        self._backoff.works()
        raise StopAsyncIteration

    async def _receive(self) -> bytes:
        """What the next receive brings; nothing if all of it was to be skipped."""
        if self._answer is None:
            self._answer, self._skip, self._stop = await self._blob.open_part(
                self._position, self._end, self._backoff, whole=self._whole
            )
        answer = self._answer
        chunk = await anext(answer, None)
        if chunk is None:
            raise Fault(f"{answer.url_host} ended the answer early")
        self._backoff.progress(len(chunk))
        if self._skip:
            skipped = min(self._skip, len(chunk))
            self._skip -= skipped
            chunk = chunk[skipped:]
        if self._position + len(chunk) > self._stop:
            raise RegistryError(f"{answer.url_host} sends more of {self._blob.digest} than it said")
        self._position += len(chunk)
        self._blob.note_success()
        if self._position == self._stop < self._end:
            await self._close()
        return chunk

    async def _close(self) -> None:
        """Return the connection if the body was read to its end, otherwise close it."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if self._position == self._stop:
            await answer.drain(limit=0)
        else:
            await answer.aclose()
