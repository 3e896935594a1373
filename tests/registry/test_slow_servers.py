# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for ever for a server that goes on sending, but hardly anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError, RegistryUnreachable
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings, find_referrers
from lazysnap.registry.push import push_blob
from lazysnap.registry.transport import _Pace
from tests.support.clocks import patient_clock
from tests.support.slow_servers import dripping

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n"
_SIZED = _HEAD + b"Content-Length: 1000000\r\n\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_CHALLENGE = (
    b'HTTP/1.1 401 No\r\nContent-Length: 0\r\nWWW-Authenticate: Bearer realm="http://%s/"\r\n\r\n'
)
_DIGEST = Digest.of(b"x")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


@pytest.mark.parametrize(
    ("at_once", "drips"),
    [
        (_SIZED, b"x" * 1_000_000),
        (_CHUNKED, b"1\r\nx\r\n" * 200_000),
        (_CHUNKED, b"1;" + b"x" * 90_000),
        (b"", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 90_000),
        (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-999999/*\r\n", b"X: " + b"x" * 90_000),
        (b"HTTP/1.1 500 No\r\nContent-Length: 4000\r\n\r\n", b"x" * 4000),
        (b"HTTP/1.1 307 No\r\nLocation: /x\r\nContent-Length: 60000\r\n\r\n", b"x" * 60_000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000),
    ],
    ids=["sized", "chunked", "chunk-extension", "head", "206", "error", "redirect", "continue"],
)
@pytest.mark.parametrize("seconds", [9.0, 1.0])
async def test_a_byte_now_and_then_is_as_good_as_none(
    clock: trio.testing.MockClock, at_once: bytes, drips: bytes, seconds: float
) -> None:
    operations: dict[str, Callable[[Registry, Reference], object]] = {
        "manifest": lambda registry, image: registry.manifest(image),
        "tail": lambda registry, image: registry.blob(image, _DIGEST).tail(1000),
        "read": lambda registry, image: registry.blob(image, _DIGEST, 1_000_000).read(0, 9999),
        "probe": lambda registry, image: registry.blob(image, _DIGEST, 9).probe(),
        "referrers": lambda registry, image: find_referrers(registry, image, _DIGEST, "a/b"),
        "push": lambda registry, image: push_blob(registry.exchange, image, b"x", "a/b"),
    }
    for name, operation in operations.items():
        # A new client each, as one that knows the server to be dead would give up sooner.
        async with (
            dripping(at_once, drips, seconds=seconds) as host,
            Registry(RegistrySettings(), Anonymous()) as registry,
        ):
            began = trio.current_time()
            try:
                await operation(registry, Reference.parse(f"{host}/x:1"))  # type: ignore[misc]
            except LazysnapError:
                pass
            else:
                assert name in ("probe", "push")
            assert trio.current_time() - began < 60, name


def test_pace() -> None:
    pace = _Pace(10, 100)
    assert pace.left == 10
    pace.note(9, 10)
    assert pace.left == 1
    pace.note(2, 10)  # the machine was busy
    assert pace.left == 0
    pace.note(0, 980)
    assert pace.left == 10, "of the next window"
    pace.note(1, 5000)
    assert pace.left == float("inf")
    pace.note(9, 1)
    assert pace.left == 10


async def test_a_token_must_come_in_time(clock: trio.testing.MockClock) -> None:
    settings = RegistrySettings()
    async with dripping(_SIZED, b"{" * 1_000_000, size=6000, seconds=1) as token:
        answer = _CHALLENGE % token.encode()
        async with (
            dripping(answer, b"", seconds=1) as host,
            Registry(settings, Anonymous()) as registry,
        ):
            with pytest.raises(RegistryUnreachable, match="too slowly"):
                await registry.manifest(Reference.parse(f"{host}/x:1"))
            assert trio.current_time() <= settings.retry_seconds + 5


async def test_a_document_has_a_time_limit_at_any_rate(clock: trio.testing.MockClock) -> None:
    size = oci.MAX_DOCUMENT
    head = _HEAD + b"Content-Length: %d\r\n\r\n" % size
    async with (
        dripping(head, b"x" * size, size=6000, seconds=1) as host,
        Registry(RegistrySettings(), Anonymous()) as registry,
    ):
        with pytest.raises(RegistryUnreachable, match="too slowly"):
            await registry.manifest(Reference.parse(f"{host}/x:1"))
        assert 100 < trio.current_time() < 200
        blob = oci.Descriptor(media_type="a/b", digest=_DIGEST, size=size)
        began = trio.current_time()
        with pytest.raises(RegistryUnreachable, match="too slowly"):
            await registry.blob_bytes(Reference.parse(f"{host}/x:1"), blob, size)
        assert trio.current_time() - began < 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_slow_is_not_too_slow(clock: trio.testing.MockClock, chunked: bool) -> None:
    """Twice the least rate, in pieces that come as late as they may."""
    data = bytes(range(256)) * 400
    if chunked:
        head, body = _CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    else:
        head, body = _HEAD + b"Content-Length: %d\r\n\r\n" % len(data), data
    async with (
        dripping(head, body, size=9000, seconds=9) as host,
        Registry(RegistrySettings(), Anonymous()) as registry,
    ):
        blob = registry.blob(Reference.parse(f"{host}/x:1"), Digest.of(data), len(data))
        async with blob.whole_stream() as stream:
            assert b"".join([piece async for piece in stream]) == data
        assert registry.statistics().requests == 1


async def test_a_slow_reader_is_not_a_slow_server(clock: trio.testing.MockClock) -> None:
    data = bytes(1000)
    async with (
        dripping(_HEAD + b"Content-Length: 1000\r\n\r\n", data, size=10, seconds=0.01) as host,
        Registry(RegistrySettings(), Anonymous()) as registry,
    ):
        blob = registry.blob(Reference.parse(f"{host}/x:1"), Digest.of(data), len(data))
        received = 0
        async with blob.whole_stream() as stream:
            async for piece in stream:
                received += len(piece)
                await trio.sleep(20)
        assert received == len(data)
        assert registry.statistics().requests == 1
