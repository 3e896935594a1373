# SPDX-License-Identifier: Apache-2.0
"""Our connection against httpcore's own: the same answers, errors and reuse, whatever a server sends."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import httpcore
import httpx
import pytest
import trio

from lazysnap.credentials.docker_config import Anonymous
from lazysnap.errors import RegistryError
from lazysnap.http.pool import PoolTransport
from lazysnap.reference import Reference
from lazysnap.registry import Registry
from tests.registry.conftest import SETTINGS
from tests.support.registry import Break, FaultyRegistry, Headers

DATA = random.Random(2).randbytes(3_000_000)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def sized(body: bytes, length: int | None = None, more: bytes = b"") -> bytes:
    size = len(body) if length is None else length
    return OK + more + b"Content-Length: %d\r\n\r\n" % size + body


# What the server sends, in pieces; whether it hangs up after that; the method.
ANSWERS: dict[str, tuple[Sequence[bytes], bool, str]] = {
    "length": ([sized(DATA)], False, "GET"),
    "length, byte by byte": ([bytes([b]) for b in sized(b"0123456789")], False, "GET"),
    "length of nothing": ([sized(b"")], False, "GET"),
    "length twice": ([sized(b"abc", more=b"content-length: 3\r\n")], False, "GET"),
    "two lengths": ([sized(b"abc", more=b"Content-Length: 4\r\n")], True, "GET"),
    "negative length": ([sized(b"abc", length=-3)], True, "GET"),
    "too short": ([sized(DATA, length=len(DATA) + 1)], True, "GET"),
    "no body at all": ([sized(b"", length=5)], True, "GET"),
    "closed afterwards": ([sized(DATA, more=b"Connection: close\r\n")], False, "GET"),
    "HTTP/1.0": ([sized(b"abc").replace(b"1.1", b"1.0")], False, "GET"),
    "chunked": ([OK + CHUNKED + b"\r\n3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n"], False, "GET"),
    "chunked with a length": ([sized(b"3\r\nabc\r\n0\r\n\r\n", more=CHUNKED)], False, "GET"),
    "chunks end early": ([OK + CHUNKED + b"\r\n3\r\nabc\r\n"], True, "GET"),
    "bad chunks": ([OK + CHUNKED + b"\r\nxyz\r\n"], True, "GET"),
    "until the end": ([OK + b"\r\n" + DATA], True, "GET"),
    "hints first": ([b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n", sized(b"abc")], False, "GET"),
    "switches": ([b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\n"], True, "GET"),
    "HEAD": ([OK + b"Content-Length: 1000\r\n\r\n"], False, "HEAD"),
    "204": ([b"HTTP/1.1 204 No\r\nContent-Length: 1000\r\n\r\n"], False, "GET"),
    "304": ([b"HTTP/1.1 304 No\r\nContent-Length: 1000\r\n\r\n"], False, "GET"),
    "404": ([sized(b"no").replace(b"200 OK", b"404 No")], False, "GET"),
    "not HTTP": ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], True, "GET"),
    "half a head": ([OK + b"Content-Len"], True, "GET"),
    "nothing": ([], True, "GET"),
    "endless head": ([OK + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n"], True, "GET"),
}


class Scripted:
    """Answers every request in the same way, and counts its connections."""

    def __init__(self, pieces: Sequence[bytes], hang_up: bool) -> None:
        self.pieces = pieces
        self.hang_up = hang_up
        self.connections = 0
        self.open = 0
        self.url = ""

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open += 1
        head = b""
        try:
            while data := await stream.receive_some(65536):
                head += data
                if not head.endswith(b"\r\n\r\n"):
                    continue
                head = b""
                for piece in self.pieces:
                    await stream.send_all(piece)
                if self.hang_up:
                    await stream.send_eof()
        except trio.BrokenResourceError:
            pass  # the client has seen enough
        finally:
            self.open -= 1


@asynccontextmanager
async def scripted(pieces: Sequence[bytes], *, hang_up: bool = False) -> AsyncIterator[Scripted]:
    server = Scripted(pieces, hang_up)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        yield server
        nursery.cancel_scope.cancel()


def ours(keep_alive_seconds: float = SETTINGS.keep_alive_seconds) -> httpx.AsyncBaseTransport:
    return PoolTransport(
        ssl.create_default_context(),
        max_connections=SETTINGS.max_connections,
        keep_alive_seconds=keep_alive_seconds,
    )


async def outcome(transport: httpx.AsyncBaseTransport, url: str, method: str) -> tuple[object, ...]:
    """What comes of a request: all of the answer, or the kind of error and what came before."""
    received = b""
    try:
        async with (
            httpx.AsyncClient(transport=transport, timeout=60) as client,
            client.stream(method, url, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            async for piece in answer.aiter_raw():
                received += piece
            return answer.status_code, answer.http_version, answer.headers.raw, received
    except (httpx.TransportError, httpcore.ProtocolError, httpcore.NetworkError) as error:
        return type(error).__name__, received


class Kept(httpx.AsyncBaseTransport):
    """A transport that outlives its clients."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self.inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self.inner.handle_async_request(request)


@pytest.mark.parametrize("name", ANSWERS)
async def test_same_as_httpcore(name: str) -> None:
    pieces, hang_up, method = ANSWERS[name]
    found = []
    for transport in (httpx.AsyncHTTPTransport(), ours()):
        async with scripted(pieces, hang_up=hang_up) as server:
            outcomes = [await outcome(Kept(transport), server.url, method) for _ in range(2)]
            found.append((outcomes, server.connections))
            await transport.aclose()
    assert found[1] == found[0]


async def test_more_than_was_announced_is_not_the_next_answer() -> None:
    transport = ours()
    async with scripted([sized(b"abc") + sized(b"smuggled")]) as server:
        for _ in range(2):
            status, *_, body = await outcome(Kept(transport), server.url, "GET")
            assert (status, body) == (200, b"abc")
        assert server.connections == 2
        await transport.aclose()


async def test_who_is_held_back_gets_small_pieces() -> None:
    async with scripted([sized(DATA)]) as server, ours() as transport:
        request = httpx.Request("GET", server.url, extensions={"timeout": {"read": 60}})
        answer = await transport.handle_async_request(request)
        received = []
        async for piece in answer.aiter_raw():
            received.append(piece)
            await trio.sleep(0.1)
        await answer.aclose()
        assert b"".join(received) == DATA
        assert max(len(piece) for piece in received) <= 256 << 10


async def test_idle_connections_expire() -> None:
    transport = ours(keep_alive_seconds=0.001)
    async with scripted([sized(b"abc")]) as server:
        for _ in range(2):
            assert (await outcome(Kept(transport), server.url, "GET"))[-1] == b"abc"
            await trio.sleep(0.01)
        assert server.connections == 2
        await transport.aclose()


async def test_body_that_ends_where_it_should_not(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    """All of it was received when it turns out to be too long: the connection must not be lost."""
    blob = registry.blob(image, server.add_blob(DATA), len(DATA))
    server.faults.append(Headers({"Content-Range": f"bytes 0-98/{len(DATA)}"}))
    with pytest.raises(RegistryError, match="more of"):
        await blob.read(0, 100)
    assert await blob.read(0, 100) == DATA[:100]


@pytest.mark.parametrize("after", [-1, 0, 100, 1_500_000])
async def test_cancelled_anywhere_gives_its_place_in_the_pool_back(
    server: FaultyRegistry, image: Reference, after: int
) -> None:
    settings = replace(SETTINGS, max_connections=1, stall_seconds=60)
    async with Registry(settings, Anonymous()) as registry:
        blob = registry.blob(image, server.add_blob(DATA), len(DATA))
        server.faults.append(Break(after=after, how="stall"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blob.read, 0, len(DATA))
            await server.stalled.wait()
            nursery.cancel_scope.cancel()
        assert await blob.read(0, len(DATA)) == DATA
        assert server.accepted == 2
