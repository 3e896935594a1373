# SPDX-License-Identifier: Apache-2.0
"""Manifests, images and small blobs from a scripted server."""

from __future__ import annotations

import json

import pytest
import trio

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import (
    DigestMismatch,
    FormatError,
    RegistryError,
    RegistryNotFound,
    RegistryUnreachable,
)
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry import HostTable, Registry, RegistrySettings
from lazysnap.registry.hosts import Endpoint
from tests.registry.conftest import SETTINGS
from tests.support.registry import (
    Break,
    FaultyRegistry,
    Headers,
    Status,
    faulty_registry,
    small_tar,
)

AMD64 = Platform.parse("linux/amd64")
ARM64 = Platform.parse("linux/arm64")


def add_index(server: FaultyRegistry, name: Reference, *entries: dict[str, object]) -> Digest:
    data = json.dumps({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries})
    return server.add_manifest(name.repository, name.tag or "", oci.OCI_INDEX, data.encode())


def entry(descriptor: oci.Descriptor, architecture: str) -> dict[str, object]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
        "platform": {"os": "linux", "architecture": architecture},
    }


async def test_manifest_by_tag_and_by_digest(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    pushed = server.add_image("team/app", "1", [small_tar(a=b"x")])
    by_tag, data = await registry.manifest(image)
    assert by_tag == pushed
    assert await registry.manifest(image.with_digest(pushed.digest)) == (pushed, data)
    assert await registry.manifest(image, pushed.digest) == (pushed, data)
    assert [r.path.rpartition("/")[2] for r in server.log] == ["1", pushed.digest, pushed.digest]
    accepted = server.log[0].headers["accept"].split(", ")
    assert accepted[-1] == "*/*"
    assert {oci.OCI_MANIFEST, oci.OCI_INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_LIST} < set(accepted)


async def test_an_images_manifest_is_fetched_once(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    pushed = server.add_image("team/app", "1", [small_tar(a=b"x")])
    found = []

    async def ask() -> None:
        found.append(await registry.image_manifest(image, pushed.digest))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    await ask()
    assert len(server.log) == 1
    assert found == [oci.parse_manifest(server.manifests["team/app", pushed.digest][1])] * 4


async def test_only_some_manifests_are_remembered(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    digests = []
    for number in range(65):
        digests.append(server.add_image("team/app", "1", [small_tar(a=b"%d" % number)]).digest)
        await registry.image_manifest(image, digests[-1])
    asked = len(server.log)
    await registry.image_manifest(image, digests[1])
    assert len(server.log) == asked
    await registry.image_manifest(image, digests[0])
    assert len(server.log) == asked + 1


async def test_manifest_with_other_content_than_its_digest(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    digest = Digest.of(b"something else")
    server.manifests["team/app", digest] = (oci.OCI_MANIFEST, b"{}")
    with pytest.raises(DigestMismatch):
        await registry.manifest(image, digest)


async def test_digest_header_is_not_believed(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    pushed = server.add_image("team/app", "1", [])
    server.faults.append(Headers(headers={"Docker-Content-Digest": Digest.of(b"lie")}))
    assert (await registry.manifest(image))[0].digest == pushed.digest


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("application/json; charset=utf-8", oci.OCI_MANIFEST),
        ("application/vnd.oci.image.manifest.v1+json; charset=utf-8", oci.OCI_MANIFEST),
        ("", oci.OCI_MANIFEST),
    ],
)
async def test_media_type(
    server: FaultyRegistry, registry: Registry, image: Reference, sent: str, expected: str
) -> None:
    server.add_image("team/app", "1", [])
    server.faults.append(Headers(headers={"Content-Type": sent}))
    assert (await registry.manifest(image))[0].media_type == expected


async def test_manifest_that_is_too_large(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    server.add_manifest("team/app", "1", oci.OCI_MANIFEST, b" " * (oci.MAX_DOCUMENT + 1))
    with pytest.raises(RegistryError, match="more than 8388608"):
        await registry.manifest(image)
    assert registry.statistics().bytes_received == 0


@pytest.mark.parametrize("after", [-1, 0, 10])
async def test_manifest_survives_a_broken_connection(
    server: FaultyRegistry, registry: Registry, image: Reference, after: int
) -> None:
    pushed = server.add_image("team/app", "1", [])
    server.faults.append(Break(after=after))
    assert (await registry.manifest(image))[0] == pushed


async def test_missing_manifest_and_refused_ones(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    with pytest.raises(RegistryNotFound, match="team/app:1"):
        await registry.manifest(image)
    for status in (400, 405, 418, 501):
        server.faults.append(Status(status, {}, b"\xff" * 10_000))
        with pytest.raises(RegistryError, match=f"answers {status}"):
            await registry.manifest(image)


async def test_image_without_index(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    tar = small_tar(a=b"x" * 1000)
    pushed = server.add_image("team/app", "1", [tar])
    found = await registry.fetch_image(image, AMD64)
    assert found.top == found.descriptor == pushed
    assert found.config.diff_ids == (Digest.of(tar),)
    assert found.manifest.config.digest == Digest.of(found.config_bytes)
    with pytest.raises(RegistryNotFound, match="linux/amd64"):
        await registry.fetch_image(image, ARM64)


async def test_image_by_index(server: FaultyRegistry, registry: Registry, image: Reference) -> None:
    amd = server.add_image("team/app", "a", [small_tar(a=b"x")])
    arm = server.add_image("team/app", "b", [small_tar(b=b"x")], architecture="arm64")
    top = add_index(server, image, entry(amd, "amd64"), entry(arm, "arm64"))
    for platform, pushed in ((AMD64, amd), (ARM64, arm)):
        found = await registry.fetch_image(image, platform)
        assert found.top.digest == top
        assert found.descriptor.digest == pushed.digest
        assert [d.digest for d, _ in found.documents] == [top, pushed.digest]
        assert all(Digest.of(data) == d.digest for d, data in found.documents)
    with pytest.raises(RegistryNotFound, match="linux/amd64, linux/arm64"):
        await registry.fetch_image(image, Platform.parse("linux/s390x"))


async def test_index_that_lies_about_sizes(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    amd = server.add_image("team/app", "a", [])
    add_index(server, image, entry(amd, "amd64") | {"size": amd.size + 1})
    with pytest.raises(FormatError):
        await registry.fetch_image(image, AMD64)


async def test_indexes_within_indexes_end(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    inner = server.add_image("team/app", "a", [])
    for depth in range(6):
        digest = add_index(server, image, entry(inner, "amd64"))
        size = len(server.manifests["team/app", digest][1])
        inner = oci.Descriptor(media_type=oci.OCI_INDEX, digest=digest, size=size)
        if depth == 1:
            assert (await registry.fetch_image(image, AMD64)).config.os == "linux"
    with pytest.raises(FormatError, match="too many"):
        await registry.fetch_image(image, AMD64)


async def test_config_with_other_content_than_its_digest(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    pushed = server.add_image("team/app", "1", [])
    manifest = oci.parse_manifest(server.manifests["team/app", pushed.digest][1])
    size = manifest.config.size
    server.blobs[manifest.config.digest] = b"{" + b" " * (size - 1)
    with pytest.raises(DigestMismatch):
        await registry.fetch_image(image, AMD64)


async def test_blob_larger_than_the_limit_is_not_asked_for(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    descriptor = oci.Descriptor(media_type="x", digest=Digest.of(b""), size=1001)
    with pytest.raises(FormatError, match="more than 1000"):
        await registry.blob_bytes(image, descriptor, 1000)
    assert server.log == []


async def test_empty_blob(server: FaultyRegistry, registry: Registry, image: Reference) -> None:
    descriptor = oci.Descriptor(media_type="x", digest=Digest.of(b""), size=0)
    assert await registry.blob_bytes(image, descriptor, 1000) == b""


class Mirrored(HostTable):
    """A host behind one mirror that has content by digest only."""

    def __init__(self, settings: RegistrySettings, mirror: str) -> None:
        super().__init__(settings)
        self.mirror = mirror

    def endpoints(self, host: str) -> tuple[Endpoint, ...]:
        mirror = Endpoint(
            f"http://{self.mirror}/v2",
            self.mirror,
            headers=(("X-Mirror", "yes"),),
            capabilities=frozenset({"pull"}),
            namespace=host,
        )
        return (mirror, *super().endpoints(host))


async def test_endpoints_are_tried_in_order(server: FaultyRegistry, image: Reference) -> None:
    pushed = server.add_image("team/app", "1", [])
    digest = server.add_blob(b"x" * 1000)
    async with faulty_registry() as mirror:
        mirror.blobs[digest] = server.blobs[digest]
        async with Registry(hosts=Mirrored(SETTINGS, mirror.host)) as registry:
            assert await registry.blob(image, digest).read(1, 5) == b"xxxxx"
            assert not server.log
            # Tags only from the host itself; what the mirror lacks, from there too.
            assert (await registry.manifest(image))[0] == pushed
            assert len(mirror.log) == 1
            assert (await registry.manifest(image, pushed.digest))[0] == pushed
            mirror.faults.append(Status(503, times=100))
            assert await registry.blob(image, digest).read(1, 5) == b"xxxxx"
    assert {r.query for r in mirror.log} == {f"ns=127.0.0.1%3A{server.ports['registry']}"}
    assert all(r.headers["x-mirror"] == "yes" for r in mirror.log)
    assert all("x-mirror" not in r.headers and not r.query for r in server.log)


async def test_plain_http_only_where_it_is_asked_for(server: FaultyRegistry) -> None:
    # A name of this machine that does not look like it.
    host = f"localtest:{server.ports['registry']}"
    table = HostTable(RegistrySettings())
    assert table.endpoints(host)[0].base_url == f"https://{host}/v2"
    table.allow_plain_http(host)
    assert table.endpoints(host)[0].base_url == f"http://{host}/v2"


async def test_https_to_a_plain_server_fails_clearly(server: FaultyRegistry) -> None:
    class Https(HostTable):
        def endpoints(self, host: str) -> tuple[Endpoint, ...]:
            return (Endpoint(f"https://{host}/v2", host),)

    settings = RegistrySettings(retry_seconds=0.3)
    async with Registry(settings, Anonymous(), hosts=Https(settings)) as registry:
        with pytest.raises(RegistryUnreachable, match="did not answer in time"):
            await registry.manifest(Reference.parse(f"{server.host}/x:1"))
