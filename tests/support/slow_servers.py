# SPDX-License-Identifier: Apache-2.0
"""Servers that never say no, and never come to an end; for tests with a clock that does not wait."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import trio


@contextlib.contextmanager
def black_hole(*, accepts: bool) -> Iterator[str]:
    """Host and port where nobody answers.

    Args:
        accepts: connections are made; otherwise not even that.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0 if not accepts else 1000)
        address = listening.getsockname()
        if not accepts:
            for _ in range(4):  # until the kernel takes no more
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
        yield f"127.0.0.1:{address[1]}"


def refusing() -> str:
    """Host and port where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


@contextlib.asynccontextmanager
async def dripping(
    at_once: bytes, drips: bytes, *, size: int = 1, seconds: float
) -> AsyncIterator[str]:
    """A server that answers each request with some bytes at once, and others little by little.

    Args:
        at_once: of the answer, with its head.
        drips: what follows; the connection stays open afterwards.
        size: bytes at a time.
        seconds: between them.

    Yields:
        Its host and port.
    """

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                received = b""
                while b"\r\n\r\n" not in received:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    received += more
                await stream.send_all(at_once)
                for start in range(0, len(drips), size):
                    await trio.sleep(seconds)
                    await stream.send_all(drips[start : start + size])
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()
