# SPDX-License-Identifier: Apache-2.0
"""The pool: how many connections there are, who gets which, and that none is lost."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from dataclasses import replace

import httpcore
import httpx
import pytest
import trio
import trio.testing

from lazysnap.credentials.docker_config import Anonymous
from lazysnap.http.pool import PoolTransport, UploadBody
from lazysnap.reference import Reference
from lazysnap.registry import Registry
from tests.http.test_connection import Scripted, scripted, sized
from tests.registry.conftest import SETTINGS
from tests.support.registry import faulty_registry


def new_pool(most: int) -> PoolTransport:
    return PoolTransport(
        ssl.create_default_context(),
        max_connections=most,
        keep_alive_seconds=SETTINGS.keep_alive_seconds,
    )


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted([sized(b"abc")]) as server:
        yield server


async def ask(
    pool: PoolTransport, server: Scripted, timeout: float | None = None
) -> httpx.Response:
    request = httpx.Request(
        "GET",
        server.url,
        headers={"Host": "x"},
        stream=UploadBody(b"", lambda seconds: None),
        extensions={"timeout": {"pool": timeout, "read": 60.0}},
    )
    return await pool.handle_async_request(request)


async def use(pool: PoolTransport, server: Scripted) -> None:
    answer = await ask(pool, server)
    assert await answer.aread() == b"abc"
    await answer.aclose()


async def until_open(server: Scripted, connections: int) -> None:
    with trio.fail_after(60):
        while server.open != connections:
            await trio.sleep(0.01)


async def test_idle_connections_give_way_to_those_to_other_servers(server: Scripted) -> None:
    async with new_pool(2) as pool, scripted([sized(b"abc")]) as other:
        both = [await ask(pool, server) for _ in range(2)]
        assert server.open == 2
        for answer in both:
            await answer.aread()
            await answer.aclose()
        await use(pool, other)
        await until_open(server, 1)
        await use(pool, server)
        await use(pool, other)
        assert (server.connections, other.connections) == (2, 1)


async def test_never_more_than_allowed() -> None:
    data = bytes(range(256)) * 10_000
    async with faulty_registry() as server:
        reference = Reference.parse(f"{server.host}/x:1")
        digest = server.add_blob(data)
        async with Registry(replace(SETTINGS, max_connections=3), Anonymous()) as registry:
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(registry.blob(reference, digest).read, 0, len(data))
            assert len(server.log) == 50
            assert server.accepted == 3


async def test_who_comes_too_many_waits(server: Scripted) -> None:
    async with new_pool(1) as pool:
        first = await ask(pool, server)
        with pytest.raises(httpcore.PoolTimeout):
            await ask(pool, server, timeout=0.001)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, pool, server)
            nursery.start_soon(use, pool, server)
            await trio.testing.wait_all_tasks_blocked()
            await first.aread()
            await first.aclose()
        assert server.connections == 1


async def test_who_stops_waiting_takes_nobodys_turn(server: Scripted) -> None:
    async with new_pool(1) as pool:
        first = await ask(pool, server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, pool, server)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await first.aclose()
        await use(pool, server)


async def test_what_the_server_has_closed_is_not_used_again() -> None:
    async with new_pool(1) as pool, scripted([sized(b"abc")], hang_up=True) as server:
        for _ in range(3):
            await use(pool, server)
            with trio.fail_after(60):
                while pool._idle[0].is_quiet():
                    await trio.sleep(0.001)
        assert server.connections == 3


async def test_closed_twice_is_not_closed_under_somebody_else(server: Scripted) -> None:
    async with new_pool(1) as pool:
        first = await ask(pool, server)
        await first.aread()
        await first.aclose()
        second = await ask(pool, server)
        assert isinstance(first.stream, httpx.AsyncByteStream)
        await first.stream.aclose()
        with pytest.raises(httpcore.PoolTimeout):
            await ask(pool, server, timeout=0.001)
        assert await second.aread() == b"abc"
        await second.aclose()
        await use(pool, server)
        assert server.connections == 1


async def test_refused_connections_are_not_counted(server: Scripted) -> None:
    async with new_pool(1) as pool:
        async with scripted([]) as gone:
            pass
        for _ in range(3):
            with pytest.raises(httpcore.ConnectError):
                await ask(pool, gone)
        await use(pool, server)


async def test_closing_the_pool_breaks_what_is_open() -> None:
    async with scripted([sized(b"abc", length=4)]) as server:
        pool = new_pool(2)
        answer = await ask(pool, server)
        iterator = aiter(answer.aiter_raw())
        assert await anext(iterator) == b"abc"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.aclose)
            with pytest.raises(httpcore.ReadError):
                await anext(iterator)
        await answer.aclose()
        await until_open(server, 0)
