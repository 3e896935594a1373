# SPDX-License-Identifier: Apache-2.0
"""What a server has done to one operation, others know."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import RegistryError, RegistryNotFound, RegistryUnreachable
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings
from lazysnap.registry.outages import Outages, Outlook
from lazysnap.registry.retry import Backoff, Fault
from tests.support.clocks import patient_clock
from tests.support.registry import FaultyRegistry, Status, small_tar
from tests.support.slow_servers import refusing

_DIGEST = Digest.of(b"x")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


def _outlook(outages: Outages, server: str = "host", repository: str = "a") -> Outlook:
    return outages.outlook(server, repository)


async def _may_try(outlook: Outlook) -> bool:
    try:
        outlook.check("x")
    except RegistryUnreachable:
        return False
    return True


async def test_one_tries_again_after_a_while_and_then_after_longer(
    clock: trio.testing.MockClock,
) -> None:
    outages = Outages()
    assert await _may_try(_outlook(outages))
    for seconds in (10, 20, 40, 60, 60):
        _outlook(outages).gave_up(trio.current_time(), "refused", "host")
        with pytest.raises(RegistryUnreachable, match=r"failed 0 s ago: refused"):
            _outlook(outages).check("x")
        await trio.sleep(seconds - 0.1)
        assert not await _may_try(_outlook(outages))
        await trio.sleep(0.2)
        assert await _may_try(_outlook(outages))
        assert not await _may_try(_outlook(outages)), "while the first one tries"
    # If nothing more is heard of that one, it is another's turn.
    await trio.sleep(11)
    assert await _may_try(_outlook(outages))
    # Nobody has asked for a long time.
    await trio.sleep(600)
    _outlook(outages).gave_up(trio.current_time(), "refused", "host")
    await trio.sleep(10.1)
    assert await _may_try(_outlook(outages))


async def test_many_that_fail_together_are_one_failure(clock: trio.testing.MockClock) -> None:
    outages = Outages()
    began = trio.current_time()
    await trio.sleep(5)
    for _ in range(20):
        _outlook(outages).gave_up(began, "refused", "host")
    await trio.sleep(10.1)
    assert await _may_try(_outlook(outages))


async def test_whom_a_failure_concerns(clock: trio.testing.MockClock) -> None:
    outages = Outages()
    _outlook(outages).gave_up(trio.current_time(), "503", "")
    assert not await _may_try(_outlook(outages))
    assert await _may_try(_outlook(outages, repository="b"))
    assert await _may_try(_outlook(outages, server="other"))
    _outlook(outages).reached()
    assert not await _may_try(_outlook(outages)), "an answer is not yet what was asked for"
    _outlook(outages).works()
    assert await _may_try(_outlook(outages))
    _outlook(outages).gave_up(trio.current_time(), "refused", "host")
    assert not await _may_try(_outlook(outages, repository="b"))
    _outlook(outages, repository="b").reached()
    assert await _may_try(_outlook(outages))
    # It was the server of tokens, or where blobs are: others may have others.
    _outlook(outages).gave_up(trio.current_time(), "refused", "elsewhere")
    assert await _may_try(_outlook(outages, repository="b"))


async def test_memory_is_bounded(clock: trio.testing.MockClock) -> None:
    outages = Outages()
    for number in range(10_000):
        _outlook(outages, repository=str(number)).gave_up(trio.current_time(), "x", "")
    assert len(outages._known) <= 1024
    assert not await _may_try(_outlook(outages, repository="9999"))


async def test_patience_counts_from_the_beginning_of_the_outage(
    clock: trio.testing.MockClock,
) -> None:
    """A reader waits as long as ever for a server that has just failed, and not for a dead one."""
    outages = Outages()

    async def seconds_until_given_up() -> float:
        began = trio.current_time()
        backoff = Backoff("x", 30, 10, _outlook(outages))
        with pytest.raises(RegistryUnreachable):
            while True:
                await backoff.pause(Fault("refused", unreachable="host"))
        return trio.current_time() - began

    _outlook(outages).gave_up(trio.current_time(), "refused", "host")
    await trio.sleep(5)
    assert await seconds_until_given_up() > 20
    for _ in range(400):
        assert await seconds_until_given_up() == 0
    # It works again for somebody, or nobody has looked for a long time.
    _outlook(outages).works()
    assert await seconds_until_given_up() > 20
    await trio.sleep(600)
    assert await seconds_until_given_up() > 20


async def test_a_read_looks_itself_before_it_fails(clock: trio.testing.MockClock) -> None:
    """So it finds a server that works again, however long that was dead."""
    host = refusing()
    image = Reference.parse(f"{host}/x:1")
    async with Registry(RegistrySettings(), Anonymous()) as registry:
        for _ in range(3):
            with pytest.raises(RegistryUnreachable):
                await registry.blob(image, _DIGEST, 3).read(0, 3)
        began = trio.current_time()
        for _ in range(400):
            with pytest.raises(RegistryUnreachable, match="cannot talk"):
                await registry.blob(image, _DIGEST, 3).read(0, 3)
        assert trio.current_time() == began

        async def answer(stream: trio.SocketStream) -> None:
            await stream.receive_some(65536)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")

        async with trio.open_nursery() as nursery:
            port = int(host.rpartition(":")[2])
            await nursery.start(partial(trio.serve_tcp, answer, port, host="127.0.0.1"))
            assert await registry.blob(image, _DIGEST, 3).read(0, 3) == b"abc"
            nursery.cancel_scope.cancel()


async def test_hurried_operations_fail_soon_and_then_at_once(
    clock: trio.testing.MockClock, server: FaultyRegistry
) -> None:
    image = Reference.parse(f"{server.host}/team/app:1")
    other = Reference.parse(f"{server.host}/team/other:1")
    pushed = server.add_image("team/app", "1", [small_tar(a=b"x")])
    server.add_manifest("team/other", pushed.digest, *server.manifests["team/app", "1"])
    server.faults.append(Status(503, path="/team/app/", times=10**9))
    async with Registry(RegistrySettings(), Anonymous()) as registry:
        began = trio.current_time()
        with pytest.raises(RegistryUnreachable):
            await registry.image_manifest(image, pushed.digest, hurried=True)
        assert 2 < trio.current_time() - began <= 5
        asked = len(server.log)
        with pytest.raises(RegistryUnreachable, match="not asked"):
            await registry.blob(image, _DIGEST, hurried=True).tail(100)
        assert len(server.log) == asked
        await registry.image_manifest(other, pushed.digest, hurried=True)
        server.faults.clear()
        await registry.manifest(image)  # somebody with patience finds out
        with pytest.raises(RegistryNotFound):
            await registry.blob(image, _DIGEST, hurried=True).tail(100)


async def test_a_registry_that_says_no_works(
    clock: trio.testing.MockClock, server: FaultyRegistry
) -> None:
    image = Reference.parse(f"{server.host}/team/app:1")
    async with Registry(RegistrySettings(), Anonymous()) as registry:
        for _ in range(3):
            with pytest.raises(RegistryError) as caught:
                await registry.blob(image, _DIGEST, hurried=True).tail(100)
            assert caught.value.reason == "not-in-registry"
