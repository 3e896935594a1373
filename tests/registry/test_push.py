# SPDX-License-Identifier: Apache-2.0
"""Uploads to a server that misbehaves."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous, Credential
from lazysnap.digest import Digest
from lazysnap.errors import (
    InvalidArgument,
    RegistryError,
    RegistryUnreachable,
    Unauthorized,
)
from lazysnap.reference import Reference
from lazysnap.registry import HostTable, Registry, RegistrySettings
from lazysnap.registry.hosts import Endpoint
from lazysnap.registry.push import push_blob, push_manifest
from tests.registry.conftest import SETTINGS
from tests.support.registry import Break, FaultyRegistry, Status, faulty_registry

DATA = random.Random(2).randbytes(300_000)
UPLOADS = "/blobs/uploads/"


class One:
    """Everywhere the same user."""

    async def get(self, host: str) -> Credential | None:
        return Credential(username="me", secret="word")


async def push(registry: Registry, reference: Reference, data: bytes = DATA) -> oci.Descriptor:
    with trio.fail_after(120):
        return await push_blob(registry.exchange, reference, data, "a/b")


@pytest.mark.parametrize("location", ["absolute", "relative"])
@pytest.mark.parametrize("data", [DATA, b"", b"x" * (64 << 10)])
async def test_upload(
    server: FaultyRegistry, registry: Registry, image: Reference, location: str, data: bytes
) -> None:
    server.uploads.location = location
    digest = Digest.of(data)
    expected = oci.Descriptor(media_type="a/b", digest=digest, size=len(data))
    assert await push(registry, image, data) == expected
    assert server.blobs[digest] == data
    assert [r.method for r in server.log] == ["HEAD", "POST", "PUT"]
    assert server.log[2].headers["content-length"] == str(len(data))
    assert "transfer-encoding" not in server.log[2].headers
    assert await push(registry, image, data) == expected
    await push(registry, image, data)
    assert [r.method for r in server.log[3:]] == ["HEAD", "HEAD"]
    # The Content-Length of an answer to HEAD is not waited for.
    assert server.accepted == 1


async def test_token_is_for_pushing_and_stays_at_home(
    server: FaultyRegistry, image: Reference
) -> None:
    server.auth = "bearer"
    server.users["me"] = "word"
    async with faulty_registry() as other:
        async with Registry(SETTINGS, One()) as registry:
            # The token for reading must not be taken for one for writing.
            await registry.blob(image, server.add_blob(b"there")).read(0, 5)
            await push(registry, image)
            assert server.blobs[Digest.of(DATA)] == DATA
            server.uploads.location = f"http://{other.host}"
            other.uploads.begin("", "")
            other.uploads.sessions |= {f"{n}%2F=+" for n in range(5)}
            await push(registry, image, b"elsewhere")
        assert other.blobs == {Digest.of(b"elsewhere"): b"elsewhere"}
        assert [r.authorization for r in other.log] == [None]
    tokens = [r for r in server.log if r.server == "token"]
    assert "pull%2Cpush" in tokens[-1].body.decode()
    assert "push" not in tokens[0].body.decode()


@pytest.mark.parametrize("path", [UPLOADS, "/blobs/sha256"])
@pytest.mark.parametrize("fault", [Break(), Status(503), Status(429, {"Retry-After": "0"})])
async def test_upload_is_begun_anew(
    server: FaultyRegistry,
    registry: Registry,
    image: Reference,
    path: str,
    fault: Break | Status,
) -> None:
    fault.path, fault.times = path, 1
    server.faults.append(fault)
    await push(registry, image)
    assert server.blobs[Digest.of(DATA)] == DATA


async def test_lost_session_and_lost_answer(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    server.faults += [Status(404, path="/uploads/session"), Break(path="/uploads/session")]
    await push(registry, image)
    # What was stored although nobody heard of it is not sent again.
    assert [r.method for r in server.log] == ["HEAD", "POST", "PUT"] * 2 + ["HEAD"]
    assert server.blobs[Digest.of(DATA)] == DATA


async def test_session_that_is_always_lost_ends(server: FaultyRegistry, image: Reference) -> None:
    server.faults.append(Status(404, path="/uploads/session", times=10_000))
    settings = RegistrySettings(retry_seconds=0.3)
    async with Registry(settings, Anonymous()) as registry:
        with pytest.raises(RegistryUnreachable, match="lost the session"):
            await push(registry, image)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
async def test_head_that_is_not_served(
    server: FaultyRegistry, registry: Registry, image: Reference, status: int
) -> None:
    server.faults.append(Status(status, {"Content-Length": "0"}))
    await push(registry, image)
    assert server.blobs[Digest.of(DATA)] == DATA


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "no Location"),
        ("file:///etc/passwd", "not http"),
        ("http://[::1", "unusable|not http"),
        ("http://" + "a" * 20_000, "20[0-9]* characters"),
    ],
)
async def test_hostile_locations(
    server: FaultyRegistry, registry: Registry, image: Reference, location: str, message: str
) -> None:
    server.faults += [Status(404), Status(202, {"Location": location})]
    with pytest.raises(RegistryError, match=message):
        await push(registry, image)
    assert not server.blobs


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_redirects_that_would_lose_the_body(
    server: FaultyRegistry, registry: Registry, image: Reference, status: int
) -> None:
    server.faults += [Status(404), Status(status, {"Location": "/v2/x"})]
    with pytest.raises(RegistryError, match=f"redirect of status {status}"):
        await push(registry, image)


async def test_redirect_that_keeps_method_and_body(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    path = "/v2/team/app/blobs/uploads/session?_state=0%2F=+&digest=" + Digest.of(DATA)
    server.faults.append(Status(308, {"Location": path}, path="/uploads/session"))
    await push(registry, image)
    assert [r.method for r in server.log] == ["HEAD", "POST", "PUT", "PUT"]
    assert server.blobs[Digest.of(DATA)] == DATA
    server.faults.append(Status(307, {"Location": "/again"}, path="/uploads/", times=100))
    server.faults.append(Status(307, {"Location": "/again"}, path="/again", times=100))
    with pytest.raises(RegistryError, match="more than 10 redirects"):
        await push(registry, image, b"loop")


async def test_refusals(server: FaultyRegistry, registry: Registry, image: Reference) -> None:
    for status, kind in ((403, Unauthorized), (413, RegistryError), (400, RegistryError)):
        server.faults.append(Status(status, path=UPLOADS))
        with pytest.raises(kind, match=f"answers {status}"):
            await push(registry, image)
    sent = len(server.log)
    with pytest.raises(InvalidArgument):
        await push(registry, image, bytes(oci.MAX_DOCUMENT + 1))
    assert len(server.log) == sent


async def test_slow_line_has_time_for_each_piece(
    image: Reference, clock: trio.testing.MockClock
) -> None:
    """A body of 8 MiB may take longer than the patience with a server that says nothing."""
    settings = RegistrySettings(retry_seconds=300, stall_seconds=300)
    data = bytes(oci.MAX_DOCUMENT)
    arrived = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal arrived
        head = bytearray()
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(4096)
        arrived = len(head.partition(b"\r\n\r\n")[2])
        while arrived < len(data):
            # Fifty seconds for each MiB: any of them is well within the limit, all of them are not.
            received = len(await stream.receive_some(1 << 20))
            clock.jump(50 * received / (1 << 20))
            arrived += received
        await stream.send_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        reference = Reference.parse(f"127.0.0.1:{port}/x:1")
        began = trio.current_time()
        async with Registry(settings, Anonymous()) as registry:
            await push_manifest(registry.exchange, reference, data, oci.OCI_INDEX)
        assert trio.current_time() - began > settings.retry_seconds
        nursery.cancel_scope.cancel()


async def test_cancelled_upload_leaves_nothing_open(image: Reference) -> None:
    async with trio.open_nursery() as nursery:
        ended = trio.Event()
        reading = trio.Event()

        async def serve(stream: trio.SocketStream) -> None:
            await stream.receive_some(4096)
            reading.set()
            with pytest.raises(trio.BrokenResourceError):
                while await stream.receive_some(1 << 16):
                    pass
                raise trio.BrokenResourceError
            ended.set()

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        listeners[0].socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        reference = Reference.parse(f"127.0.0.1:{port}/x:1")
        async with Registry(SETTINGS, Anonymous()) as registry:
            async with trio.open_nursery() as pushing:
                data = bytes(oci.MAX_DOCUMENT)
                pushing.start_soon(push_manifest, registry.exchange, reference, data, oci.OCI_INDEX)
                await reading.wait()
                pushing.cancel_scope.cancel()
            with trio.fail_after(120):
                await ended.wait()
        nursery.cancel_scope.cancel()


async def test_manifest_by_tag_and_by_digest(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    data = b'{"schemaVersion": 2, "manifests": []}'
    server.faults.append(Break())
    await push_manifest(registry.exchange, image, data, oci.OCI_INDEX, tag="2")
    assert (await registry.manifest(image.with_tag("2")))[1] == data
    assert (await registry.manifest(image, Digest.of(data)))[0].media_type == oci.OCI_INDEX


async def test_part_that_is_denied_for_a_while_and_for_good(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    data = b'{"schemaVersion": 2, "manifests": []}'
    denial = b'{"errors":[{"code":"DIGEST_INVALID"},{"code":"MANIFEST_BLOB_UNKNOWN"}]}'
    server.faults.append(Status(400, {}, denial, times=2))
    await push_manifest(registry.exchange, image, data, oci.OCI_INDEX)
    assert len(server.log) == 3
    server.faults.append(Status(404, {}, denial, times=10_000))
    server.faults.append(Status(400, {}, denial, times=10_000))
    with pytest.raises(RegistryError, match="MANIFEST_BLOB_UNKNOWN"):
        await push_manifest(registry.exchange, image, data, oci.OCI_INDEX)


class Mirrored(HostTable):
    """A host behind a mirror."""

    def __init__(self, mirror: str, *capabilities: str) -> None:
        super().__init__(SETTINGS)
        self.mirror, self.capabilities = mirror, frozenset(capabilities)

    def endpoints(self, host: str) -> tuple[Endpoint, ...]:
        url = f"http://{self.mirror}/v2"
        near = Endpoint(url, self.mirror, capabilities=self.capabilities, namespace=host)
        return (near, *super().endpoints(host))


async def test_mirrors_are_not_written_to(server: FaultyRegistry, image: Reference) -> None:
    async with faulty_registry() as mirror:
        mirror.add_blob(DATA)
        table = Mirrored(mirror.host, "pull", "resolve")
        async with Registry(SETTINGS, Anonymous(), hosts=table) as registry:
            await push(registry, image)
        assert not mirror.log
    assert server.blobs[Digest.of(DATA)] == DATA


async def test_all_is_written_to_one_place(server: FaultyRegistry, image: Reference) -> None:
    async with faulty_registry() as first:
        table = Mirrored(first.host, "push")
        async with Registry(SETTINGS, Anonymous(), hosts=table) as registry:
            await push(registry, image)
            first.faults.append(Status(403, path=UPLOADS))
            with pytest.raises(Unauthorized):
                await push(registry, image, b"refused")
        assert first.blobs == {Digest.of(DATA): DATA}
    assert not server.log
