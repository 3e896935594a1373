# SPDX-License-Identifier: Apache-2.0
"""The processes that build indexes, seen from the daemon: a few at once, each for one job.

They are forked by one that has parsed nothing (see `forkserver`), as Python takes long to start. Of layers
that wait for one, the largest comes first: an image is not there before its largest layer is, and the
others can be built beside it.
"""

from __future__ import annotations

import contextlib
import heapq
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import NamedTuple

import msgspec
import trio

from lazysnap import errors, log
from lazysnap.errors import FormatError, Internal
from lazysnap.layers.builder import LENGTH, TOO_BIG, Answer, Job

_log = log.get(__name__)
_BUILD_SECONDS = 120.0
_IDLE_SECONDS = 20.0
_END_SECONDS = 5.0
_MOST_ANSWER = 1 << 20


class _Server(NamedTuple):
    """The process that forks others, and the socket on which it is sent their connections."""

    process: trio.Process
    control: socket.socket


class Builders:
    """Builds indexes in processes.

    Args:
        limit: how many there may be at once.
        seconds: after which one is killed.
        kept: keep the process that forks them, while `run` runs, though there is nothing to build. It takes
            11 MB, and nearly a tenth of a second to start, or much longer if Python must be read from
            the disk.

    Attributes:
        command: how that is started.
    """

    def __init__(self, limit: int, *, seconds: float = _BUILD_SECONDS, kept: bool = False) -> None:
        self.seconds = seconds
        self.command = [sys.executable, "-P", "-m", "lazysnap.layers.builder"]
        self._limit = limit
        self._kept = kept
        self._running = 0
        self._waiting: list[tuple[int, int, trio.Event]] = []
        self._numbers = count()
        self._server: _Server | None = None
        self._starting = trio.Lock()
        self._expected = trio.Event()
        self._used = 0.0  # when it was last known that the server is needed

    def expect(self) -> None:
        """Something will have to be built soon: start meanwhile what it takes, if `run` runs."""
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
        async with self._turn(len(tail)):
            answer = None
            with trio.move_on_after(self.seconds) as scope:
                async with await self._connect() as stream:  # what is closed too early kills it
                    answer = await _ask(stream, job, tail, indexed)
            self._used = trio.current_time()
        if scope.cancelled_caught:
            raise FormatError(TOO_BIG, reason="too-big")
        if answer is None:
            raise Internal("a builder of indexes ended without an answer")
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

    async def _connect(self) -> trio.SocketStream:
        """A connection to a process for one job.

        Raises:
            Internal: there can be none.
        """
        for _ in range(2):
            server = await self._ensure_server()
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(server.control, [b"\0"], [theirs.fileno()])
                    return trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                except OSError:  # it has just ended
                    ours.close()
            await self._end_server()
        raise Internal("no builder of indexes stays")

    async def _ensure_server(self) -> _Server:
        """The process that forks others, started if it is not there."""
        async with self._starting:
            self._used = trio.current_time()
            if self._server is not None and self._server.process.poll() is not None:
                await self._end_server()
            if self._server is None:
                control, theirs = socket.socketpair()
                control.setblocking(False)
                try:
                    with theirs:
                        process = await trio.lowlevel.open_process(
                            self.command,
                            stdin=theirs,
                            stdout=subprocess.DEVNULL,
                            start_new_session=True,
                            cwd="/",
                        )
                except BaseException as error:
                    control.close()
                    if isinstance(error, OSError):
                        message = f"no builder of indexes can be started: {error}"
                        raise Internal(message) from error
                    raise
                self._server = _Server(process, control)
            return self._server

    async def run(self) -> None:
        """Start the process that forks others when it is expected to be needed, and end it when it is not.

        When cancelled, it ends all of them.
        """
        try:
            while True:
                if self._kept or self._expected.is_set():
                    self._expected = trio.Event()
                    try:
                        await self._ensure_server()
                    except Internal as error:  # who needs it will say so
                        _log.debug("no builder started ahead", error=error)
                with trio.move_on_after(_IDLE_SECONDS / 4):
                    await self._expected.wait()
                idle = trio.current_time() - self._used > _IDLE_SECONDS
                if idle and not (self._kept or self._running or self._expected.is_set()):
                    await self._end_server()
        finally:
            with trio.CancelScope(shield=True):
                await self._end_server()

    async def _end_server(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.control.close()  # it ends by that, and those that it has forked
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_END_SECONDS):
                await server.process.wait()
            server.process.kill()
            await server.process.wait()


async def _ask(
    stream: trio.SocketStream, job: Job, tail: bytes, indexed: Callable[[], object]
) -> Answer | None:
    """Send a job and get its answer; None if the process ends instead."""
    packed = msgspec.msgpack.encode(job)
    received = bytearray()
    # What is sent in place of one that has ended may have to be received all the same.
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(LENGTH.pack(len(packed)) + packed + LENGTH.pack(len(tail)))
        await stream.send_all(tail)
    try:
        answer = await _receive(stream, received)
        if answer is not None and answer.error is None and job.tree:
            indexed()
            answer = await _receive(stream, received)
    except trio.BrokenResourceError:
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
