# SPDX-License-Identifier: Apache-2.0
"""The processes that build indexes, seen from the daemon: started when needed, ended when idle."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from lazysnap import errors, log
from lazysnap.errors import FormatError, Internal
from lazysnap.layers.builder import LENGTH, Answer, Job

_log = log.get(__name__)
_BUILD_SECONDS = 120.0
_KEPT_NODES = 10_000
_IDLE_SECONDS = 20.0
_END_SECONDS = 5.0
_MOST_ANSWER = 1 << 20


class Builders:
    """A few builder processes.

    Args:
        limit: how many there may be at once.
        seconds: after which one is killed.

    Attributes:
        command: how one is started.
    """

    def __init__(self, limit: int, *, seconds: float = _BUILD_SECONDS) -> None:
        self.seconds = seconds
        self.command = [sys.executable, "-P", "-m", "lazysnap.layers.builder"]
        self._limit = trio.CapacityLimiter(limit)
        self._idle: list[tuple[trio.Process, float]] = []
        self._expected = trio.Event()

    def expect(self) -> None:
        """Something will have to be built soon: have a process start meanwhile, if `run` runs."""
        self._expected.set()

    async def build(self, job: Job, tail: bytes) -> Answer:
        """Build an index.

        Args:
            job: what is to be built.
            tail: the blob's last bytes, with all of the table of contents.

        Raises:
            LazysnapError: the layer cannot be used; `reason` says why.
        """
        async with self._limit, self._process() as process:
            answer = None
            with trio.move_on_after(self.seconds) as scope:
                answer = await _ask(process, job, tail)
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
                await _end(process)  # rather start another than keep the memory of this one
        if answer.error is not None:
            raise errors.rebuilt(*answer.error)
        return answer

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[trio.Process]:
        """A process for one job; kept for the next one if it is still well afterwards."""
        process = None
        while self._idle and process is None:
            process, _ = self._idle.pop()
            if process.poll() is not None:
                await _end(process)  # it died while it was idle
                process = None
        if process is None:
            process = await self._start()
        done = False
        try:
            yield process
            done = True
        finally:
            if done and process.poll() is None:
                self._idle.append((process, trio.current_time()))
            else:
                with trio.CancelScope(shield=True):
                    await _end(process)

    async def _start(self) -> trio.Process:
        try:
            return await trio.lowlevel.open_process(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise Internal(f"no builder of indexes can be started: {error}") from error

    async def run(self) -> None:
        """Start processes that are expected to be needed, and end those that were not for a while.

        When cancelled, it ends all of them.
        """
        try:
            while True:
                with trio.move_on_after(_IDLE_SECONDS / 4):
                    await self._expected.wait()
                if self._expected.is_set():
                    self._expected = trio.Event()
                    await self._get_ready()
                before = trio.current_time() - _IDLE_SECONDS
                while self._idle and self._idle[0][1] < before:
                    await _end(self._idle.pop(0)[0])
        finally:
            with trio.CancelScope(shield=True):
                while self._idle:
                    await _end(self._idle.pop()[0])

    async def _get_ready(self) -> None:
        if len(self._idle) + self._limit.borrowed_tokens < self._limit.total_tokens:
            try:
                process = await self._start()
            except Internal as error:  # who needs it will say so
                _log.debug("no builder started ahead", error=error)
            else:
                self._idle.append((process, trio.current_time()))


async def _end(process: trio.Process) -> None:
    process.kill()
    await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()


def _too_big() -> FormatError:
    return FormatError("the table of contents needs too much time or memory", reason="too-big")


async def _ask(process: trio.Process, job: Job, tail: bytes) -> Answer | None:
    """Send a job and get its answer; None if the process ends instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    packed = msgspec.msgpack.encode(job)
    try:
        await process.stdin.send_all(LENGTH.pack(len(packed)) + packed + LENGTH.pack(len(tail)))
        await process.stdin.send_all(tail)
        return await _receive(process.stdout)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return None


async def _receive(stream: trio.abc.ReceiveStream) -> Answer | None:
    """The next answer; None at the end of the stream.

    Raises:
        Internal: what comes is not an answer.
    """
    data = bytearray()
    while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
        if len(data) > _MOST_ANSWER:
            raise Internal("a builder of indexes sends too much")
        more = await stream.receive_some()
        if not more:
            return None
        data += more
    try:
        return msgspec.msgpack.decode(memoryview(data)[LENGTH.size :], type=Answer)
    except msgspec.MsgspecError as error:
        raise Internal(f"a builder of indexes sends no answer: {error}") from error
