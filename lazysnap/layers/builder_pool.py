# SPDX-License-Identifier: Apache-2.0
"""The processes that build indexes, seen from the daemon: a few, ended when they are idle.

Of layers that wait for one, the largest comes first: an image is not there before its largest layer is, and
the others can be built beside it.
"""

from __future__ import annotations

import heapq
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import NamedTuple

import msgspec
import trio

from lazysnap import children, errors, log
from lazysnap.errors import FormatError, Internal
from lazysnap.layers.builder import LENGTH, Answer, Job

_log = log.get(__name__)
_BUILD_SECONDS = 120.0
_KEPT_NODES = 10_000
_IDLE_SECONDS = 20.0
_END_SECONDS = 5.0
_MOST_ANSWER = 1 << 20
# So that the largest layer finds one while another layer is built.
_READY = 2


class _Idle(NamedTuple):
    """A process that waits for a job, since when, and whether it has done others."""

    process: trio.Process
    since: float
    used: bool


class BuilderPool:
    """A few builder processes.

    Args:
        limit: how many there may be at once.
        seconds: after which one is killed.
        kept: how many that have built nothing yet are kept ready, by `run`. One takes 13 MB, and a tenth
            of a second to start, or much longer if Python must be read from the disk.

    Attributes:
        command: how one is started.
    """

    def __init__(self, limit: int, *, seconds: float = _BUILD_SECONDS, kept: int = 0) -> None:
        self.seconds = seconds
        self.command = [sys.executable, "-P", "-m", "lazysnap.layers.builder"]
        self._limit = limit
        self._kept = kept
        self._running = 0
        self._waiting: list[tuple[int, int, trio.Event]] = []
        self._numbers = count()
        self._idle: list[_Idle] = []
        self._expected = trio.Event()

    def expect(self) -> None:
        """Something will have to be built soon: have processes start meanwhile, if `run` runs."""
        self._expected.set()

    async def build(
        self, job: Job, tail: bytes, indexed: Callable[[], object] = lambda: None
    ) -> Answer:
        """Build an index.

        Args:
            job: what is to be built.
            tail: the blob's last bytes, with all of the table of contents.
            indexed: called when the index is stored, and the image of the tree is not yet.

        Raises:
            LazysnapError: the layer cannot be used; `reason` says why.
        """
        async with self._turn(len(tail)), self._process() as process:
            answer = None
            with trio.move_on_after(self.seconds) as scope:
                answer = await _ask(process, job, tail, indexed)
            if scope.cancelled_caught:
                raise _too_big()
            if answer is None:
                with trio.move_on_after(_END_SECONDS):
                    await process.wait()
                # Killed: by the kernel, which was short of memory.
                if process.returncode == -signal.SIGKILL:
                    raise _too_big()
                raise Internal(f"a builder of indexes ended with {process.returncode}")
            if answer.nodes > _KEPT_NODES:
                await children.end(process)  # rather start another than keep the memory of this one
        if answer.error is not None:
            raise errors.rebuilt(*answer.error)
        return answer

    @asynccontextmanager
    async def _turn(self, size: int) -> AsyncIterator[None]:
        """A few at a time; of those that wait, the one with the greatest size first."""
        if self._running < self._limit:
            self._running += 1
        else:
            turn = trio.Event()
            waiting = (-size, next(self._numbers), turn)
            heapq.heappush(self._waiting, waiting)
            try:
                await turn.wait()
            except BaseException:
                if turn.is_set():
                    self._pass_on()
                else:
                    self._waiting.remove(waiting)
                    heapq.heapify(self._waiting)
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """End of a turn, which the next one has now."""
        if self._waiting:
            heapq.heappop(self._waiting)[2].set()
        else:
            self._running -= 1

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[trio.Process]:
        """A process for one job; kept for the next one if it is still well afterwards."""
        process = None
        while self._idle and process is None:
            process = self._idle.pop().process
            if process.poll() is not None:
                await children.end(process)  # it died while it was idle
                process = None
        if process is None:
            process = await self._start()
        done = False
        try:
            yield process
            done = True
        finally:
            if done and process.poll() is None:
                self._idle.append(_Idle(process, trio.current_time(), used=True))
            else:
                with trio.CancelScope(shield=True):
                    await children.end(process)

    async def _start(self) -> trio.Process:
        return await children.start(self.command, "to build an index")

    async def run(self) -> None:
        """Start processes that are expected to be needed, and end those that were not for a while.

        When cancelled, it ends all of them.
        """
        try:
            while True:
                await self._get_ready(self._kept)
                with trio.move_on_after(_IDLE_SECONDS / 4):
                    await self._expected.wait()
                if self._expected.is_set():
                    self._expected = trio.Event()
                    await self._get_ready(_READY)
                await self._end_idle()
        finally:
            with trio.CancelScope(shield=True):
                while self._idle:
                    await children.end(self._idle.pop().process)

    async def _get_ready(self, wanted: int) -> None:
        while len(self._idle) + self._running < min(self._limit, wanted):
            try:
                process = await self._start()
            except Internal as error:  # reported when one is needed
                _log.debug("no builder started ahead", error=error)
                return
            self._idle.append(_Idle(process, trio.current_time(), used=False))

    async def _end_idle(self) -> None:
        before = trio.current_time() - _IDLE_SECONDS
        fresh = [each for each in self._idle if not each.used]
        kept = fresh[: self._kept]
        for each in [each for each in self._idle if each.since < before and each not in kept]:
            self._idle.remove(each)
            await children.end(each.process)


def _too_big() -> FormatError:
    return FormatError("the table of contents needs too much time or memory", reason="too-big")


async def _ask(
    process: trio.Process, job: Job, tail: bytes, indexed: Callable[[], object]
) -> Answer | None:
    """Send a job and get its answer; None if the process ends instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    packed = msgspec.msgpack.encode(job)
    received = bytearray()
    try:
        await process.stdin.send_all(LENGTH.pack(len(packed)) + packed + LENGTH.pack(len(tail)))
        await process.stdin.send_all(tail)
        answer = await _receive(process.stdout, received)
        if answer is not None and answer.error is None and job.tree:
            indexed()
            answer = await _receive(process.stdout, received)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return None
    return answer


async def _receive(stream: trio.abc.ReceiveStream, data: bytearray) -> Answer | None:
    """The next answer; None at the end of the stream.

    Args:
        stream: of the process.
        data: what was received and not used yet.

    Raises:
        Internal: what comes is not an answer.
    """
    while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
        if len(data) > _MOST_ANSWER:
            raise Internal("a builder of indexes sends too much")
        more = await stream.receive_some()
        if not more:
            return None
        data += more
    end = LENGTH.size + LENGTH.unpack_from(data)[0]
    body = bytes(data[LENGTH.size : end])
    del data[:end]
    try:
        return msgspec.msgpack.decode(body, type=Answer)
    except msgspec.MsgspecError as error:
        raise Internal(f"a builder of indexes sends no answer: {error}") from error
