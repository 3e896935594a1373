# SPDX-License-Identifier: Apache-2.0
"""The processes that unpack layers, seen from the daemon. Each has one job and ends with it."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import sys
from collections.abc import AsyncIterable

import msgspec
import trio

from lazysnap import children, errors
from lazysnap.errors import FormatError, Internal
from lazysnap.unpack.process import LENGTH, Answer, Job

_END_SECONDS = 5.0
_MOST_ANSWER = 1 << 20
_PIPE_BYTES = 1 << 20
"""Between the daemon and a process; the usual 64 KiB make both wait for each other too often."""


class ApplierPool:
    """Unpacks layers in processes.

    Args:
        limit: how many there may be at once.

    Attributes:
        command: how one is started.
    """

    def __init__(self, limit: int) -> None:
        self.command = [sys.executable, "-P", "-m", "lazysnap.unpack.process"]
        self._limit = trio.CapacityLimiter(limit)

    async def apply(self, job: Job, blob: AsyncIterable[bytes]) -> Answer:
        """Unpack a layer. The process has ended when this returns, also when it is cancelled.

        Args:
            job: what, and where to.
            blob: its bytes, as they come. Reading may stop before their end, and it is the
                caller's to close them (`contextlib.aclosing` of a generator).

        Raises:
            LazysnapError: it cannot be unpacked; the target may have something in it.
        """
        async with self._limit:
            process = await children.start(self.command, "to unpack a layer")
            try:
                answer = await _ask(process, job, blob)
                if answer is None:
                    with trio.move_on_after(_END_SECONDS):
                        await process.wait()
                    # Killed: by the kernel, which was short of memory.
                    if process.returncode == -signal.SIGKILL:
                        raise FormatError(f"layer {job.digest} needs too much memory")
                    raise Internal(f"unpacking {job.digest} ended with {process.returncode}")
            finally:
                with trio.CancelScope(shield=True):
                    await children.end(process)
        if answer.error is not None:
            raise errors.rebuilt(*answer.error)
        return answer


async def _ask(process: trio.Process, job: Job, blob: AsyncIterable[bytes]) -> Answer | None:
    """Send a job and its blob and get the answer; None if the process ends instead."""
    answer: Answer | None = None
    failure: errors.LazysnapError | None = None
    assert isinstance(process.stdin, trio.lowlevel.FdStream)
    assert process.stdout is not None
    with contextlib.suppress(OSError):  # a user may have only so many
        fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            # At once: it answers early when something is wrong, and reads no further then.
            nonlocal answer
            assert process.stdout is not None
            answer = await _receive(process.stdout)
            nursery.cancel_scope.cancel()

        nursery.start_soon(receive)
        packed = msgspec.msgpack.encode(job)
        try:
            await process.stdin.send_all(LENGTH.pack(len(packed)) + packed)
            async for piece in blob:
                await process.stdin.send_all(piece)
            await process.stdin.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the answer says why
        except errors.LazysnapError as error:
            failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return answer


async def _receive(stream: trio.abc.ReceiveStream) -> Answer | None:
    """All that a process says; None if that is no answer."""
    data = bytearray()
    try:
        async for piece in stream:
            data += piece
            if len(data) > _MOST_ANSWER:
                return None
    except trio.BrokenResourceError:
        return None
    if len(data) < LENGTH.size or len(data) != LENGTH.size + LENGTH.unpack_from(data)[0]:
        return None
    try:
        return msgspec.msgpack.decode(data[LENGTH.size :], type=Answer)
    except msgspec.MsgspecError:
        return None
