# SPDX-License-Identifier: Apache-2.0
"""httpx on httpcore's connection pool, with connections of our own (see `connection`).

Goes through the public `create_connection` of httpcore's pool, which httpx itself does not pass on.
Knows nothing of registries. Errors of the body stay httpcore's, which saves a layer per piece.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpcore
import httpx
import trio

from lazysnap.registry.connection import Connection
from lazysnap.registry.hosts import RegistrySettings

_WRITE_SIZE = 64 << 10


class _Pool(httpcore.AsyncConnectionPool):
    """httpcore's pool, of our connections."""

    def __init__(self, settings: RegistrySettings, context: ssl.SSLContext) -> None:
        super().__init__(
            max_connections=settings.max_connections,
            max_keepalive_connections=settings.max_connections,
        )
        self._make = partial(
            Connection, context=context, keep_alive_seconds=settings.keep_alive_seconds
        )

    def create_connection(self, origin: httpcore.Origin) -> Connection:
        """A connection that is not made yet; called by httpcore."""
        return self._make(origin)


class _PoolStream(httpx.AsyncByteStream):
    """A body as httpx wants it; its errors stay httpcore's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __aiter__(self) -> AsyncIterator[bytes]:
        iterator: AsyncIterator[bytes] = self.inner.__aiter__()
        return iterator

    async def aclose(self) -> None:
        await self.inner.aclose()


class _NoBody(httpx.AsyncByteStream, AsyncIterator[bytes]):
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


NO_BODY = _NoBody()
"""The body of a request that has none."""


class UploadBody(httpx.AsyncByteStream):
    """A body to send in pieces, so that a slow line has the time limit of a write for each.

    Iterators are objects and not generators: an upload that is cancelled leaves nothing suspended.

    Args:
        content: all of the body.
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
    """httpx on a connection pool of httpcore with our connections."""

    def __init__(self, settings: RegistrySettings, context: ssl.SSLContext) -> None:
        self._pool = _Pool(settings, context)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; called by httpx."""
        answer = await self._pool.handle_async_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=_PoolStream(answer.stream),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()
