# SPDX-License-Identifier: Apache-2.0
"""Calls between processes: msgpack frames over a unix socket.

A frame is as in `lazysnap.frames`. A request is `{"call": name, "args": {...}}`;
the answer is `{"ok": value}` or `{"error": {"class", "message", "hint", "reason"}}`. Each call uses a
connection of its own, so nothing has to be put together again when either side restarts. A call that
takes long can have other messages before its answer, and ends when the caller hangs up. Knows nothing of
what is called.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import trio

from lazysnap import errors, frames, log
from lazysnap.errors import Internal, LazysnapError, Unavailable

_log = log.get(__name__)

BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)
"""What the use of a socket raises when the other side, or the socket itself, is gone."""

Handler = Callable[..., Awaitable[Any]]
Tell = Callable[[Mapping[str, Any]], None]
"""Sends the caller a message, which must have neither `ok` nor `error`; returns at once."""


async def receive(stream: trio.abc.ReceiveStream) -> dict[str, Any] | None:
    """The next message of a stream, or None at its end.

    Raises:
        Unavailable: the stream ended inside a frame, or what came is not a frame.
    """
    head = await _exactly(stream, frames.LENGTH.size)
    if head is None:
        return None
    body = await _exactly(stream, frames.length(head))
    if body is None:
        raise Unavailable("the peer went away in the middle of a message")
    return frames.unpack(body)


async def answer_of(stream: trio.abc.ReceiveStream, path: str) -> Any:
    """What the peer answers to the call that was sent to it.

    Args:
        stream: the connection.
        path: where the peer listens; for messages.

    Raises:
        Unavailable: there is no answer.
        LazysnapError: what the handler raised.
    """
    answer = await receive(stream)
    if answer is None:
        raise Unavailable(f"the peer at {path} hung up without an answer")
    if "error" in answer:
        raise frames.unpack_error(answer["error"])
    return answer.get("ok")


async def _exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            more = await stream.receive_some(min(count - len(data), 1 << 18))
        except BROKEN as error:
            raise Unavailable(f"the peer went away: {error}") from error
        if not more:
            if data:
                raise Unavailable("the peer went away in the middle of a message")
            return None
        data += more
    return bytes(data)


async def call(path: str, name: str, *, timeout: float, **args: Any) -> Any:
    """Call `name` at the socket `path` and return its answer.

    Args:
        path: the unix socket.
        name: a handler of the peer.
        timeout: seconds until the whole call must have been answered.
        args: what the handler gets; msgpack types only.

    Raises:
        Unavailable: nobody listens, or there was no answer in time.
        LazysnapError: what the handler raised.
    """
    answer = None
    with trio.move_on_after(timeout) as scope:
        try:
            stream = await trio.open_unix_socket(path)
        except OSError as error:
            raise Unavailable(f"nobody answers at {path}: {error.strerror}") from error
        try:
            async with stream:
                await stream.send_all(frames.pack({"call": name, "args": args}))
                answer = await answer_of(stream, path)
        except BROKEN as error:
            raise Unavailable(f"the peer at {path} went away: {error}") from error
    if scope.cancelled_caught:
        raise Unavailable(f"{path} did not answer {name!r} within {timeout:g} s")
    return answer


async def serve(
    path: str,
    handlers: Mapping[str, Handler],
    *,
    telling: Mapping[str, Handler] = MappingProxyType({}),
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve calls at a unix socket until cancelled; a file in the way is replaced.

    Args:
        path: where to listen; created with mode 0600.
        handlers: async functions by the name they are called by.
        telling: likewise those that tell of their progress: they get a `Tell` first, and are cancelled
            when the caller hangs up.
        task_status: told when calls are accepted.
    """
    listener = listen(path)

    async def connection(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                request = await receive(stream)
                if request is None:
                    return
                if request.get("call") in telling:
                    await _answer_while_heard(stream, telling, request)
                else:
                    await stream.send_all(await _answer(handlers, request))
        except (Unavailable, *BROKEN) as error:
            _log.debug("call broken off", error=error)

    await trio.serve_listeners(connection, [listener], task_status=task_status)


async def _answer_while_heard(
    stream: trio.SocketStream, handlers: Mapping[str, Handler], request: Mapping[str, Any]
) -> None:
    """Answer a call that tells of its progress."""
    send, frames_to_send = trio.open_memory_channel[bytes](math.inf)

    def tell(message: Mapping[str, Any]) -> None:
        send.send_nowait(frames.pack(message))

    async def handle() -> None:
        told = {name: partial(handler, tell) for name, handler in handlers.items()}
        with send:
            send.send_nowait(await _answer(told, request))

    async def listen_for_the_end() -> None:
        with contextlib.suppress(*BROKEN):
            await stream.receive_some(1)  # callers send nothing more
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(handle)
        nursery.start_soon(listen_for_the_end)
        with contextlib.suppress(*BROKEN):
            async for frame in frames_to_send:
                await stream.send_all(frame)
        nursery.cancel_scope.cancel()


async def _answer(handlers: Mapping[str, Handler], request: Mapping[str, Any]) -> bytes:
    """The frame that answers a request."""
    name = str(request.get("call"))
    handler = handlers.get(name)
    try:
        if handler is None:
            raise errors.InvalidArgument(f"there is no call {name!r}")
        return frames.pack({"ok": await handler(**request.get("args", {}))})
    except LazysnapError as error:
        return frames.pack({"error": frames.pack_error(error)})
    except Exception as error:  # an edge: a bug in one call must not end the process
        _log.exception("call failed", call=name)
        return frames.pack(
            {"error": frames.pack_error(Internal(f"{name}: {type(error).__name__}: {error}"))}
        )


def listen(path: str) -> trio.SocketListener:
    """A unix socket that only its owner can connect to; a file in the way is replaced.

    Raises:
        Internal: the socket cannot be made.
    """
    aside = f"{path}.{os.getpid()}"
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)  # of an earlier process with the same number
        raw.bind(aside)
        os.chmod(aside, 0o600)
        raw.listen(64)
        # Renamed into place, so that there is never a moment without a listening socket.
        os.rename(aside, path)
    except OSError as error:
        raw.close()
        raise Internal(f"cannot listen at {path}: {error}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(raw))
