# SPDX-License-Identifier: Apache-2.0
"""A transport of httpx: connections to all servers, kept for the next request (see `connection`).

The pool of httpcore asks the kernel about every connection twice for each request, and wraps each body in
a generator, which took a fifth of the CPU time of a request. Knows nothing of registries. Raises the errors
of httpcore.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable

import httpcore
import httpx
import trio

from lazysnap.http import PORTS
from lazysnap.http.connection import Connection, Origin

_WRITE_SIZE = 64 << 10


class UploadBody(httpx.AsyncByteStream):
    """A body to send in pieces, so that a slow line has the time limit of a write for each.

    Iterators are objects and not generators: an upload that is cancelled leaves nothing suspended.

    Args:
        content: all of the body; empty if there is none.
        sent: called after each piece has been written, with the seconds that it took.
    """

    def __init__(self, content: bytes, sent: Callable[[float], None]) -> None:
        self.content = content
        self.sent = sent

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Pieces(self)


class _Pieces(AsyncIterator[bytes]):
    def __init__(self, body: UploadBody) -> None:
        self._body = body
        self._position = 0
        self._began: float | None = None

    async def __anext__(self) -> bytes:
        now = trio.current_time()
        if self._began is not None:
            self._body.sent(now - self._began)
        piece = self._body.content[self._position : self._position + _WRITE_SIZE]
        if not piece:
            raise StopAsyncIteration
        self._position += len(piece)
        self._began = now
        return piece


class PoolTransport(httpx.AsyncBaseTransport):
    """Connections of our own, up to a limit; requests beyond it wait in line.

    Args:
        context: for https.
        max_connections: to all servers together.
        keep_alive_seconds: how long a connection is kept without a request.
    """

    def __init__(
        self, context: ssl.SSLContext, *, max_connections: int, keep_alive_seconds: float
    ) -> None:
        self._most = max_connections
        self._keep_alive_seconds = keep_alive_seconds
        self._context = context
        self._turns = trio.Semaphore(max_connections)
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []  # the one that was used last at the end

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; called by httpx.

        Returns:
            The answer, which keeps its connection until it is closed.

        Raises:
            httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError: none came.
        """
        url = request.url
        port = PORTS[url.scheme] if url.port is None else url.port
        await self._take_turn(request.extensions.get("timeout", {}).get("pool"))
        connection = await self._connection(Origin(url.scheme, url.raw_host.decode("ascii"), port))
        return await connection.send(request)

    async def _take_turn(self, timeout: float | None) -> None:
        try:
            self._turns.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_after(float("inf") if timeout is None else timeout):
                return await self._turns.acquire()
            raise httpcore.PoolTimeout from None

    async def _connection(self, origin: Origin) -> Connection:
        """An idle connection to a server, or a new one; closes those that are of no more use."""
        expired = trio.current_time() - self._keep_alive_seconds
        while self._idle and self._idle[0].idle_since < expired:
            await self._close(self._idle.pop(0))
        while (found := self._find(origin)) is not None:
            if found.is_quiet():
                return found
            await self._close(found)
        while len(self._connections) >= self._most:
            await self._close(self._idle.pop(0))
        connection = Connection(origin, self._context, self._release)
        self._connections.add(connection)
        return connection

    def _find(self, origin: Origin) -> Connection | None:
        """Take the idle connection to a server that was used last."""
        for i in reversed(range(len(self._idle))):
            if self._idle[i].origin == origin:
                return self._idle.pop(i)
        return None

    async def _close(self, connection: Connection) -> None:
        self._connections.discard(connection)
        await connection.aclose()

    def _release(self, connection: Connection) -> None:
        """Take a connection back whose exchange has ended."""
        if connection.is_closed:
            self._connections.discard(connection)
        else:
            self._idle.append(connection)
        self._turns.release()

    async def aclose(self) -> None:
        """Close all connections."""
        self._idle.clear()
        while self._connections:
            await self._connections.pop().aclose()
