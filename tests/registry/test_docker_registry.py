# SPDX-License-Identifier: Apache-2.0
"""Against Debian's docker-registry, filled by skopeo."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import tarfile
from pathlib import Path

import pytest

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import RegistryNotFound, Unauthorized
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry import DockerConfig, Registry
from tests.registry.conftest import SETTINGS
from tests.support.docker_registry import docker_registry

AMD64 = Platform.parse("linux/amd64")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout of one image with one layer of 3 MB."""
    layout = tmp_path / "layout"
    (layout / "blobs/sha256").mkdir(parents=True)

    def blob(media_type: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    content = tmp_path / "content"
    content.write_bytes(random.Random(1).randbytes(3_000_000))
    with tarfile.open(tmp_path / "layer.tar", "w") as archive:
        archive.add(content, "content")
    layer = (tmp_path / "layer.tar").read_bytes()
    rootfs = {"type": "layers", "diff_ids": [Digest.of(layer)]}
    config = {"os": "linux", "architecture": "amd64", "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "config": blob(oci.OCI_CONFIG, json.dumps(config).encode()),
        "layers": [blob(oci.OCI_LAYER_GZIP, gzip.compress(layer, 1))],
    }
    top = blob(oci.OCI_MANIFEST, json.dumps(manifest).encode())
    top["annotations"] = {"org.opencontainers.image.ref.name": "1"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return layout


async def _check(registry: Registry, reference: Reference, layout: Path) -> None:
    image = await registry.fetch_image(reference, AMD64)
    (layer,) = image.manifest.layers or ()
    stored = (layout / "blobs/sha256" / layer.digest.hex).read_bytes()
    assert image.config.diff_ids == (Digest.of(gzip.decompress(stored)),)
    blob = registry.blob(reference, layer.digest)
    before = registry.statistics().requests
    tail = await blob.tail(10_000)
    assert registry.statistics().requests == before + 1
    assert (tail.data, tail.size) == (stored[-10_000:], len(stored))
    assert await blob.read(1_000_000, 1_000_000) == stored[1_000_000:2_000_000]
    await blob.probe()
    received = bytearray()
    async with registry.stream_blob(reference, layer.digest, layer.size, 100) as stream:
        async for chunk in stream:
            received += chunk
    assert received == stored[100:]


async def test_without_login(tmp_path: Path, layout: Path) -> None:
    with docker_registry(tmp_path) as server:
        server.copy(f"oci:{layout}:1", "team/app:1")
        reference = Reference.parse(f"{server.host}/team/app:1")
        async with Registry(SETTINGS, Anonymous()) as registry:
            await _check(registry, reference, layout)
            with pytest.raises(RegistryNotFound):
                await registry.manifest(reference.with_tag("2"))
            with pytest.raises(RegistryNotFound):
                await registry.blob(reference, Digest.of(b"nothing")).tail(10)
            missing = Reference.parse(f"{server.host}/nobody/nothing:1")
            with pytest.raises(RegistryNotFound):
                await registry.manifest(missing)


async def test_with_password(tmp_path: Path, layout: Path) -> None:
    with docker_registry(tmp_path, htpasswd={"me": "pass:word"}) as server:
        server.copy(f"oci:{layout}:1", "team/app:1")
        reference = Reference.parse(f"{server.host}/team/app:1")
        auth_file = tmp_path / "config.json"
        async with Registry(SETTINGS, DockerConfig(str(auth_file), environ={})) as registry:
            with pytest.raises(Unauthorized):
                await registry.manifest(reference)
            # A login while we run is noticed.
            entry = {"username": "me", "password": "pass:word"}
            auth_file.write_text(json.dumps({"auths": {server.host: entry}}))
            await _check(registry, reference, layout)


async def test_docker_manifests(tmp_path: Path, layout: Path) -> None:
    with docker_registry(tmp_path) as server:
        server.copy(f"oci:{layout}:1", "app:1")
        server.copy(f"docker://{server.host}/app:1", "app:2", "--format=v2s2")
        reference = Reference.parse(f"{server.host}/app:2")
        async with Registry(SETTINGS, Anonymous()) as registry:
            image = await registry.fetch_image(reference, AMD64)
        assert image.top.media_type == oci.DOCKER_MANIFEST
        assert image.manifest.config.media_type == oci.DOCKER_CONFIG
        assert [oci.layer_kind(d.media_type) for d in image.manifest.layers or ()] == [
            oci.LayerKind.GZIP
        ]
