# SPDX-License-Identifier: Apache-2.0
"""httpx's connection pool, with sockets that are read in large pieces.

Goes through the public `network_backend` of httpcore, which httpx itself does not pass on. Knows
nothing of registries. Errors of the body stay httpcore's, which saves a layer per piece.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpcore
import httpx
import trio

from lazysnap.registry.hosts import RegistrySettings

_WRITE_SIZE = 64 << 10
_READ_SIZE = 256 << 10
"""Bytes per receive. httpcore's own 64 KiB halves the speed of a stream on loopback."""


class _WideStream(httpcore.AsyncNetworkStream):
    """A network stream that reads more at once than it is asked for."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(
        self, max_bytes: int, timeout: float | None = None
    ) -> bytes:  # httpcore's signature
        return await self._inner.read(max(max_bytes, _READ_SIZE), timeout)

    async def write(
        self, buffer: bytes, timeout: float | None = None
    ) -> None:  # httpcore's signature
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # httpcore's signature
    ) -> httpcore.AsyncNetworkStream:
        try:
            inner = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            # httpcore forgets the socket when a handshake is cancelled.
            with trio.CancelScope(shield=True):
                await self._inner.aclose()
            raise
        return _WideStream(inner)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _WideBackend(httpcore.AsyncNetworkBackend):
    """trio's sockets, read in large pieces."""

    def __init__(self) -> None:
        self._inner = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _WideStream(
            await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        )

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _PoolStream(httpx.AsyncByteStream):
    """A body as httpx wants it; its errors stay httpcore's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __aiter__(self) -> AsyncIterator[bytes]:
        iterator: AsyncIterator[bytes] = self.inner.__aiter__()
        return iterator

    async def aclose(self) -> None:
        await self.inner.aclose()


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
    """httpx on a connection pool of httpcore with our network backend."""

    def __init__(self, settings: RegistrySettings, context: ssl.SSLContext) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=settings.max_connections,
            max_keepalive_connections=settings.max_connections,
            keepalive_expiry=settings.keep_alive_seconds,
            network_backend=_WideBackend(),
        )

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
