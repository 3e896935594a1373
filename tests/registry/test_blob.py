# SPDX-License-Identifier: Apache-2.0
"""Ranges of blobs, from a server that misbehaves in every way we have heard of."""

from __future__ import annotations

import random
import time

import pytest
import trio
import trio.testing

from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import (
    InvalidArgument,
    RangesUnsupported,
    RegistryError,
    RegistryNotFound,
    RegistryUnreachable,
    Unauthorized,
)
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings, RemoteBlob
from tests.support.registry import Break, FaultyRegistry, Headers, Ranges, Status

DATA = random.Random(1).randbytes(1_000_000)


@pytest.fixture
def blob(server: FaultyRegistry, registry: Registry, image: Reference) -> RemoteBlob:
    return registry.blob(image, server.add_blob(DATA), len(DATA))


@pytest.fixture
def unsized(server: FaultyRegistry, registry: Registry, image: Reference) -> RemoteBlob:
    return registry.blob(image, server.add_blob(DATA))


async def test_read_sends_one_request_without_encoding(
    server: FaultyRegistry, blob: RemoteBlob
) -> None:
    assert blob.last_success is None
    before = time.monotonic()
    assert await blob.read(1000, 5000) == DATA[1000:6000]
    assert await blob.read(len(DATA) - 1, 1) == DATA[-1:]
    assert await blob.read(7, 0) == b""
    assert [r.range for r in server.log] == ["bytes=1000-5999", "bytes=999999-999999"]
    assert {r.headers["accept-encoding"] for r in server.log} == {"identity"}
    assert blob.last_success is not None
    assert before <= blob.last_success <= time.monotonic()


async def test_connections_are_reused_and_closed(
    server: FaultyRegistry, blob: RemoteBlob, registry: Registry
) -> None:
    for start in range(0, 300_000, 10_000):
        await blob.read(start, 10_000)
    assert server.connections == 1
    async with trio.open_nursery() as nursery:
        for start in range(5):
            nursery.start_soon(blob.read, start, 700_000)
    assert server.connections <= 6


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, len(DATA) + 1), (len(DATA), 1)])
async def test_ranges_outside_are_refused_without_asking(
    server: FaultyRegistry, blob: RemoteBlob, start: int, length: int
) -> None:
    with pytest.raises(InvalidArgument):
        await blob.read(start, length)
    assert server.log == []


@pytest.mark.parametrize("start", [len(DATA) - 10, len(DATA), len(DATA) + 10])
async def test_range_beyond_an_unknown_size_is_an_error(unsized: RemoteBlob, start: int) -> None:
    with pytest.raises(RegistryError):
        await unsized.read(start, 20)


async def test_tail_takes_one_request(server: FaultyRegistry, unsized: RemoteBlob) -> None:
    tail = await unsized.tail(5000)
    assert (tail.data, tail.size, unsized.size) == (DATA[-5000:], len(DATA), len(DATA))
    assert [r.range for r in server.log] == ["bytes=-5000"]


async def test_tail_of_known_size_is_a_plain_range(
    server: FaultyRegistry, blob: RemoteBlob
) -> None:
    assert (await blob.tail(5000)).data == DATA[-5000:]
    assert [r.range for r in server.log] == ["bytes=995000-999999"]


@pytest.mark.parametrize("content", [b"", b"short"])
async def test_tail_of_a_short_blob_is_the_blob(
    server: FaultyRegistry, registry: Registry, image: Reference, content: bytes
) -> None:
    tail = await registry.blob(image, server.add_blob(content)).tail(1000)
    assert (tail.data, tail.size) == (content, len(content))
    assert len(server.log) == 1


@pytest.mark.parametrize("how", ["suffix-501", "suffix-prefix", "ignore-suffix"])
async def test_tail_without_suffix_ranges(
    server: FaultyRegistry, unsized: RemoteBlob, how: str
) -> None:
    server.faults.append(Ranges(how=how))
    tail = await unsized.tail(5000)
    assert (tail.data, tail.size) == (DATA[-5000:], len(DATA))


@pytest.mark.parametrize("status", [400, 416])
async def test_tail_of_a_server_that_refuses_suffix_ranges(
    server: FaultyRegistry, unsized: RemoteBlob, status: int
) -> None:
    server.faults.append(Status(status))
    assert (await unsized.tail(5000)).data == DATA[-5000:]
    assert [r.range for r in server.log] == ["bytes=-5000", "bytes=0-0", "bytes=995000-999999"]


async def test_tail_of_a_server_without_ranges(
    server: FaultyRegistry, registry: Registry, image: Reference, unsized: RemoteBlob
) -> None:
    server.faults.append(Ranges(how="ignore", times=100))
    small = registry.blob(image, server.add_blob(DATA[:20_000]))
    assert (await small.tail(5000)).data == DATA[15_000:20_000]
    with pytest.raises(RangesUnsupported):
        await unsized.tail(5000)
    # A megabyte that nobody wants is not read to its end.
    assert len(server.requests(path="blobs")) <= 4


@pytest.mark.parametrize("after", [0, 2000])
async def test_tail_survives_a_broken_connection(
    server: FaultyRegistry, unsized: RemoteBlob, after: int
) -> None:
    server.faults.append(Break(after=after))
    assert (await unsized.tail(5000)).data == DATA[-5000:]


@pytest.mark.parametrize("how", ["reset", "close", "stall"])
@pytest.mark.parametrize("after", [-1, 0, 1, 400_000])
async def test_stream_survives_broken_connections(
    server: FaultyRegistry, registry: Registry, blob: RemoteBlob, how: str, after: int
) -> None:
    server.faults.append(Break(after=after, how=how))
    received = bytearray()
    async with blob.read_stream(100, 900_000) as stream:
        async for chunk in stream:
            assert chunk
            received += chunk
    assert received == DATA[100:900_100]
    assert len(server.log) == 2
    assert registry.statistics().retries == 1
    # A reset may throw away what was on its way; otherwise nothing is asked for twice.
    if how != "reset":
        assert server.log[1].range == f"bytes={100 + max(after, 0)}-900099"


async def test_stream_continues_after_short_answers(
    server: FaultyRegistry, blob: RemoteBlob
) -> None:
    server.faults.append(Ranges(how="short", times=3))
    assert await blob.read(10, 100_000) == DATA[10:100_010]
    assert len(server.log) == 4


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_transient_statuses_are_retried(
    server: FaultyRegistry, blob: RemoteBlob, status: int
) -> None:
    server.faults.append(Status(status, times=2))
    assert await blob.read(0, 10) == DATA[:10]
    assert [r.status for r in server.log] == [status, status, 206]


async def test_retry_after_is_honoured(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.faults.append(Status(429, {"Retry-After": "1"}))
    before = trio.current_time()
    assert await blob.read(0, 10) == DATA[:10]
    assert trio.current_time() - before >= 1


async def test_retry_after_is_capped(server: FaultyRegistry, image: Reference) -> None:
    server.faults.append(Status(503, {"Retry-After": "86400"}))
    settings = RegistrySettings(retry_after_seconds=0.1)
    async with Registry(settings, Anonymous()) as registry:
        blob = registry.blob(image, server.add_blob(DATA))
        with trio.fail_after(120):
            assert await blob.read(0, 10) == DATA[:10]


@pytest.mark.parametrize(
    "fault", [Status(503), Break(after=-1), Break(after=0, how="stall"), Break(after=1)]
)
async def test_gives_up_when_the_time_is_used_up(
    server: FaultyRegistry, image: Reference, fault: Status | Break
) -> None:
    fault.times = 1_000_000
    server.faults[:] = [fault]
    settings = RegistrySettings(retry_seconds=0.6, stall_seconds=0.1)
    digest = server.add_blob(DATA)
    async with Registry(settings, Anonymous()) as registry:
        with pytest.raises(RegistryUnreachable, match=r"gave up after 0\.6 s") as caught:
            await registry.blob(image, digest, len(DATA)).read(0, 500_000)
    assert digest in str(caught.value)
    assert server.host in str(caught.value)
    assert caught.value.retryable


async def test_unreachable_server(image: Reference, server: FaultyRegistry) -> None:
    with trio.socket.socket() as bound:
        await bound.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        host = f"127.0.0.1:{bound.getsockname()[1]}"
        async with Registry(RegistrySettings(retry_seconds=0.3), Anonymous()) as registry:
            blob = registry.blob(Reference.parse(f"{host}/x:1"), Digest.of(b""), 10)
            with pytest.raises(RegistryUnreachable, match=host):
                await blob.read(0, 1)


async def test_missing_blob(server: FaultyRegistry, registry: Registry, image: Reference) -> None:
    blob = registry.blob(image, Digest.of(b"not there"), 10)
    with pytest.raises(RegistryNotFound, match="BLOB_UNKNOWN not here"):
        await blob.read(0, 1)
    assert len(server.log) == 1


@pytest.mark.parametrize("how", ["ignore", "shift"])
async def test_other_ranges_than_asked_for_are_refused(
    server: FaultyRegistry, blob: RemoteBlob, how: str
) -> None:
    server.faults.append(Ranges(how=how, times=100))
    with pytest.raises(RangesUnsupported):
        await blob.read(100, 1000)


async def test_whole_blob_instead_of_a_range_that_is_all_of_it(
    server: FaultyRegistry, blob: RemoteBlob
) -> None:
    server.faults.append(Ranges(how="ignore"))
    assert await blob.read(0, len(DATA)) == DATA


@pytest.mark.parametrize(
    "value",
    [
        "",
        "bytes 100-1099/*x",
        "bytes 1099-100/1000000",
        "bytes 100-1100/1000000",
        "items 100-1099/9",
    ],
)
async def test_unusable_content_range(server: FaultyRegistry, blob: RemoteBlob, value: str) -> None:
    server.faults.append(Headers(headers={"Content-Range": value}))
    with pytest.raises(RangesUnsupported):
        await blob.read(100, 1000)


async def test_content_range_of_unknown_size(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.faults.append(Headers(headers={"Content-Range": "bytes 100-1099/*"}))
    assert await blob.read(100, 1000) == DATA[100:1100]


async def test_another_size_than_the_manifest_says(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    blob = registry.blob(image, server.add_blob(DATA), len(DATA) + 1)
    with pytest.raises(RegistryError, match="expected 1000001"):
        await blob.read(0, 10)


async def test_encoded_bodies_are_refused(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.faults.append(Headers(headers={"Content-Encoding": "gzip"}))
    with pytest.raises(RegistryError, match="gzip"):
        await blob.read(0, 10)


async def test_416_within_the_blob(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.faults.append(Status(416))
    with pytest.raises(RegistryError, match="does not have bytes=0-9"):
        await blob.read(0, 10)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_followed_once_and_remembered(
    server: FaultyRegistry, blob: RemoteBlob, status: int
) -> None:
    server.redirect, server.redirect_status = True, status
    for start in (0, 5, 10):
        assert await blob.read(start, 10) == DATA[start : start + 10]
    assert [r.server for r in server.log] == ["registry", "storage", "storage", "storage"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_expired_redirect_is_resolved_again(
    server: FaultyRegistry, blob: RemoteBlob, status: int
) -> None:
    server.redirect, server.stale_status = True, status
    await blob.read(0, 10)
    server.signature = "two"
    del server.log[:]
    assert await blob.read(5, 10) == DATA[5:15]
    assert [(r.server, r.status) for r in server.log] == [
        ("storage", status),
        ("registry", 307),
        ("storage", 206),
    ]


async def test_redirect_that_stays_refused(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.redirect = True
    await blob.read(0, 10)
    server.redirect_to = f"http://{server.storage_host}/store/{blob.digest}?signature=wrong"
    server.signature = "two"
    del server.log[:]
    with pytest.raises(Unauthorized):
        await blob.read(0, 10)
    assert len(server.log) == 3


async def test_broken_storage_is_resolved_again(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.redirect = True
    await blob.read(0, 10)
    server.faults.append(Break(server="storage", after=300_000))
    assert await blob.read(0, 600_000) == DATA[:600_000]


@pytest.mark.parametrize(
    "location",
    [
        "",
        "ftp://127.0.0.1/x",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://xn--\u00e9/",
        "file:///etc/passwd",
    ],
)
async def test_unusable_redirects(server: FaultyRegistry, blob: RemoteBlob, location: str) -> None:
    server.faults.append(Status(307, {"Location": location}))
    with pytest.raises(RegistryError):
        await blob.read(0, 10)
    assert len(server.log) == 1


async def test_endless_redirects(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.faults.append(Status(307, {"Location": "/v2/elsewhere"}, times=100))
    with pytest.raises(RegistryError, match="redirects"):
        await blob.read(0, 10)
    assert len(server.log) == 11


async def test_overlong_url(server: FaultyRegistry, blob: RemoteBlob) -> None:
    location = f"http://{server.storage_host}/{'x' * 20_000}"
    server.faults.append(Status(307, {"Location": location}))
    with pytest.raises(RegistryError, match="characters"):
        await blob.read(0, 10)


async def test_overlong_headers(server: FaultyRegistry, image: Reference) -> None:
    server.faults.append(Headers(headers={"X-Long": "x" * 2_000_000}, times=1_000))
    async with Registry(RegistrySettings(retry_seconds=0.3), Anonymous()) as registry:
        with pytest.raises(RegistryUnreachable):
            await registry.blob(image, server.add_blob(DATA)).read(0, 10)


async def test_probe(server: FaultyRegistry, blob: RemoteBlob) -> None:
    server.redirect = True
    await blob.probe()
    server.signature = "two"
    await blob.probe()
    assert blob.last_success is not None
    assert sum(r.sent for r in server.log) == 2
    server.faults.append(Status(503, times=1_000_000))
    server.faults.append(Status(503, server="storage", times=1_000_000))
    with pytest.raises(RegistryUnreachable, match=r"gave up after 0\.2 s"):
        await blob.probe(seconds=0.2)


async def test_probe_of_an_empty_blob(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    await registry.blob(image, server.add_blob(b"")).probe()


async def test_cancelled_read_closes_its_connection(
    server: FaultyRegistry, blob: RemoteBlob
) -> None:
    server.faults.append(Break(after=1000, how="stall"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(blob.read, 0, 100_000)
        await server.stalled.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(120):
        while server.connections:
            await trio.lowlevel.checkpoint()
    assert await blob.read(0, 100_000) == DATA[:100_000]


async def test_abandoned_stream_closes_its_connection(
    server: FaultyRegistry, blob: RemoteBlob
) -> None:
    async with blob.read_stream(0, len(DATA)) as stream:
        first = await anext(stream)
        assert DATA.startswith(first)
    with trio.fail_after(120):
        while server.connections:
            await trio.lowlevel.checkpoint()
    assert await blob.read(0, 10) == DATA[:10]


async def test_statistics_count_by_host(
    server: FaultyRegistry, registry: Registry, blob: RemoteBlob
) -> None:
    server.redirect = True
    await blob.read(0, 1000)
    await blob.read(0, 500)
    statistics = registry.statistics()
    assert statistics.hosts[server.host].requests == 1
    assert statistics.hosts[server.storage_host].requests == 2
    assert statistics.hosts[server.storage_host].bytes_received == 1500
    assert (statistics.requests, statistics.bytes_received, statistics.retries) == (3, 1500, 0)


@pytest.mark.parametrize("after", [None, 0, 300_000])
@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("how", ["honour", "ignore"])
async def test_whole_blob_from_any_server(  # fixtures
    server: FaultyRegistry,
    registry: Registry,
    image: Reference,
    after: int | None,
    start: int,
    how: str,
) -> None:
    if after is not None:
        server.faults.append(Break(after=after, how="close"))
    if how == "ignore":
        server.faults.append(Ranges(how="ignore", times=100))
    digest = server.add_blob(DATA)
    received = bytearray()
    async with registry.stream_blob(image, digest, len(DATA), start) as stream:
        async for chunk in stream:
            received += chunk
    assert received == DATA[start:]


async def test_slow_consumer_keeps_the_patience_of_the_stream(
    server: FaultyRegistry, image: Reference, clock: trio.testing.MockClock
) -> None:
    server.faults.append(Break(after=300_000, how="close"))
    async with Registry(RegistrySettings(retry_seconds=300), Anonymous()) as registry:
        blob = registry.blob(image, server.add_blob(DATA), len(DATA))
        received = bytearray()
        async with blob.read_stream(0, len(DATA)) as stream:
            async for chunk in stream:
                received += chunk
                if len(received) == 300_000:
                    clock.jump(400)  # longer than the patience, which is what is tested
    assert received == DATA
