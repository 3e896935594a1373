# SPDX-License-Identifier: Apache-2.0
"""A layer's blob of which the end need not be fetched, as it came with the table of contents.

Knows nothing of members: any range that ends within the tail (see `blob_tail`) takes from it what it can.

Invariant: a byte comes from the tail at most once in a process. Whoever asks for it again found it
wrong, and the network may have a better one; or the cache has lost it, which can happen to any byte.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lazysnap import log
from lazysnap.fetch.byte_source import ByteSource, Counters, LocalBytes
from lazysnap.layers.blob_tail import BlobTail, open_tail, read_tail
from lazysnap.paths import INDEX_TAIL

_log = log.get(__name__)
# As a network would bring it, so that the first members are decoded while others are handed out.
_PIECE = 256 << 10


class TailSource:
    """A source that asks another one only for what is not in a tail.

    Args:
        source: the blob.
        index_path: of the layer's index; the tail is beside it, if there is one.
        counters: of whoever reads from this; a request that was not needed is taken off.
    """

    def __init__(self, source: ByteSource, index_path: str, counters: Counters) -> None:
        self._source = source
        self._path = index_path + INDEX_TAIL
        self._counters = counters
        self._tail: BlobTail | None = None
        self._looked = False
        # What reads a tail takes no thread from what reads for others.
        self._threads = trio.CapacityLimiter(2)
        self._used: list[tuple[int, int]] = []

    @asynccontextmanager
    async def read_stream(self, start: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """Bytes of the blob as they arrive: `length` in total, or an error."""
        stop = start + length
        begin, data = await self._held(start, stop)
        if not data:
            async with self._source.read_stream(start, length) as stream:
                yield stream
        elif begin == start:
            self._counters.requests -= 1
            yield _Joined(self, None, begin, data)
        else:
            async with self._source.read_stream(start, begin - start) as stream:
                yield _Joined(self, stream, begin, data)

    async def _held(self, start: int, stop: int) -> tuple[int, bytes]:
        """The end of a range as far as the tail has it, and where in the blob that begins."""
        if not self._looked:
            # Twice at most when two requests come at once, with the same result.
            self._tail = await trio.to_thread.run_sync(open_tail, self._path, limiter=self._threads)
            self._looked = True
        tail = self._tail
        if tail is None or not tail.start < stop <= tail.stop:
            return stop, b""
        begin = max(start, tail.start)
        if any(begin < used_stop and used < stop for used, used_stop in self._used):
            return stop, b""
        data = await trio.to_thread.run_sync(read_tail, tail, begin, stop, limiter=self._threads)
        if data is None:
            _log.debug("tail is gone", path=self._path)
            self._tail = None
            return stop, b""
        return begin, data

    def give(self, start: int, size: int) -> None:
        """Note that bytes of the tail are handed out now."""
        used = self._used
        if used and used[-1][1] == start:
            used[-1] = used[-1][0], start + size
        else:
            used.append((start, start + size))


class _Joined:
    """The bytes of a stream, if there is one, then those of the tail."""

    def __init__(
        self, owner: TailSource, stream: AsyncIterator[bytes] | None, begin: int, data: bytes
    ) -> None:
        self._owner = owner
        self._stream = stream
        self._begin = begin
        self._data = data
        self._at = 0

    def __aiter__(self) -> _Joined:
        return self

    async def __anext__(self) -> bytes:
        if self._stream is not None:
            arrived = await anext(self._stream, None)
            if arrived is not None:
                return arrived
            self._stream = None
        await trio.lowlevel.checkpoint()
        piece = LocalBytes(self._data[self._at : self._at + _PIECE])
        if not piece:
            raise StopAsyncIteration
        self._owner.give(self._begin + self._at, len(piece))
        self._at += len(piece)
        return piece
