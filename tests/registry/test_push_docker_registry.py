# SPDX-License-Identifier: Apache-2.0
"""Artifacts in Debian's docker-registry, which knows no referrers; skopeo reads what we pushed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import FormatError, RegistryNotFound, Unauthorized
from lazysnap.reference import Reference
from lazysnap.registry import (
    DockerConfig,
    Registry,
    fetch_artifact,
    find_referrers,
    push_referrer,
)
from lazysnap.registry.push import push_blob, push_manifest
from lazysnap.registry.referrers import fallback_tag
from tests.registry.conftest import SETTINGS
from tests.support.docker_registry import DockerRegistry, docker_registry

TYPE = "application/vnd.example.profile.v1"
CONTENT = "application/vnd.example.profile.v1+msgpack"
SUBJECT = oci.Descriptor(media_type=oci.OCI_MANIFEST, digest=Digest.of(b"an image"), size=8)


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[DockerRegistry]:
    with docker_registry(tmp_path) as server:
        yield server


@pytest.fixture
async def client(docker: DockerRegistry) -> AsyncIterator[Registry]:
    async with Registry(SETTINGS, Anonymous()) as registry:
        yield registry


@pytest.fixture
def app(docker: DockerRegistry) -> Reference:
    return Reference.parse(f"{docker.host}/team/app:1")


def skopeo(server: DockerRegistry, command: str, name: str, *options: str) -> bytes:
    login = ["--creds", ":".join(server.user)] if server.user else []
    arguments = ["skopeo", command, "--tls-verify=false", *login, *options]
    result = subprocess.run(
        [*arguments, f"docker://{server.host}/{name}"], check=True, stdout=subprocess.PIPE
    )
    return result.stdout


async def test_round_trip_that_skopeo_can_read(
    docker: DockerRegistry, client: Registry, app: Reference, tmp_path: Path
) -> None:
    notes = {"z.example": "last", "a.example": "first"}
    pushed = await push_referrer(client, app, SUBJECT, TYPE, b"profile", CONTENT, notes)
    found = await find_referrers(client, app, SUBJECT.digest, TYPE)
    assert found == [pushed]
    assert found[0].annotations == notes
    assert await fetch_artifact(client, app, pushed, 100, subject=SUBJECT.digest) == b"profile"
    assert await find_referrers(client, app, SUBJECT.digest, TYPE + "x") == []
    assert await find_referrers(client, app, Digest.of(b"other"), TYPE) == []

    index = json.loads(
        skopeo(docker, "inspect", f"team/app:{fallback_tag(SUBJECT.digest)}", "--raw")
    )
    assert (index["mediaType"], index["schemaVersion"]) == (oci.OCI_INDEX, 2)
    (entry,) = index["manifests"]
    assert entry == {
        "mediaType": oci.OCI_MANIFEST,
        "digest": pushed.digest,
        "size": pushed.size,
        "artifactType": TYPE,
        "annotations": notes,
    }
    raw = skopeo(docker, "inspect", f"team/app@{pushed.digest}", "--raw")
    assert Digest.of(raw) == pushed.digest
    manifest = json.loads(raw)
    assert manifest["artifactType"] == TYPE
    assert manifest["subject"] == {
        "mediaType": SUBJECT.media_type,
        "digest": SUBJECT.digest,
        "size": SUBJECT.size,
    }
    assert manifest["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    # All that the manifest names can be copied away by another program.
    source = f"docker://{docker.host}/team/app@{pushed.digest}"
    command = ["skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false"]
    await trio.run_process([*command, source, f"dir:{tmp_path}/copy"])
    assert (tmp_path / "copy" / Digest.of(b"profile").hex).read_bytes() == b"profile"


async def test_login_and_none(tmp_path: Path) -> None:
    with docker_registry(tmp_path, htpasswd={"me": "pass:word"}) as server:
        reference = Reference.parse(f"{server.host}/team/app:1")
        async with Registry(SETTINGS, Anonymous()) as stranger:
            with pytest.raises(Unauthorized, match="user name and password"):
                await push_referrer(stranger, reference, SUBJECT, TYPE, b"x", CONTENT)
        auth_file = tmp_path / "config.json"
        entry = {"username": "me", "password": "pass:word"}
        auth_file.write_text(json.dumps({"auths": {server.host: entry}}))
        async with Registry(SETTINGS, DockerConfig(str(auth_file), environ={})) as registry:
            pushed = await push_referrer(registry, reference, SUBJECT, TYPE, b"x", CONTENT)
            assert await find_referrers(registry, reference, SUBJECT.digest, TYPE) == [pushed]
            assert await fetch_artifact(registry, reference, pushed, 1) == b"x"
        assert skopeo(server, "inspect", f"team/app@{pushed.digest}", "--raw")


async def test_twice_is_once_and_sends_no_body_again(
    docker: DockerRegistry, client: Registry, app: Reference
) -> None:
    first = await push_referrer(client, app, SUBJECT, TYPE, b"profile", CONTENT, {"a": "b"})
    tag = f"team/app:{fallback_tag(SUBJECT.digest)}"
    before = skopeo(docker, "inspect", tag, "--raw")
    requests = client.statistics().requests
    assert await push_referrer(client, app, SUBJECT, TYPE, b"profile", CONTENT, {"a": "b"}) == first
    # Two HEADs, the manifest, the list.
    assert client.statistics().requests == requests + 4
    assert skopeo(docker, "inspect", tag, "--raw") == before


async def test_two_artifacts_of_one_image_and_one_of_another(
    client: Registry, app: Reference
) -> None:
    other = oci.Descriptor(media_type=oci.OCI_INDEX, digest=Digest.of(b"other"), size=5)
    one = await push_referrer(client, app, SUBJECT, TYPE, b"one", CONTENT)
    two = await push_referrer(client, app, SUBJECT, TYPE, b"two", CONTENT)
    third = await push_referrer(client, app, SUBJECT, TYPE + ".v2", b"two", CONTENT)
    elsewhere = await push_referrer(client, app, other, TYPE, b"one", CONTENT)
    assert await find_referrers(client, app, SUBJECT.digest, TYPE) == [one, two]
    assert await find_referrers(client, app, SUBJECT.digest, TYPE + ".v2") == [third]
    assert await find_referrers(client, app, other.digest, TYPE) == [elsewhere]
    assert await fetch_artifact(client, app, two, 3) == b"two"
    with pytest.raises(FormatError, match="does not belong"):
        await fetch_artifact(client, app, elsewhere, 3, subject=SUBJECT.digest)


async def test_concurrent_pushes_lose_none(client: Registry, app: Reference) -> None:
    pushed: list[oci.Descriptor] = []

    async def push(number: int) -> None:
        payload = b"%d" % number
        pushed.append(await push_referrer(client, app, SUBJECT, TYPE, payload, CONTENT))

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(push, number)
    found = await find_referrers(client, app, SUBJECT.digest, TYPE)
    assert sorted(d.digest for d in found) == sorted(d.digest for d in pushed)
    assert len(found) == 12


async def test_largest_and_too_large(client: Registry, app: Reference) -> None:
    payload = b"x" * oci.MAX_DOCUMENT
    pushed = await push_referrer(client, app, SUBJECT, TYPE, payload, CONTENT)
    assert await fetch_artifact(client, app, pushed, len(payload)) == payload
    with pytest.raises(FormatError, match="more than 8388607"):
        await fetch_artifact(client, app, pushed, len(payload) - 1)


async def test_a_tag_that_is_no_list_is_left_alone(
    docker: DockerRegistry, client: Registry, app: Reference
) -> None:
    config = await push_blob(client.exchange, app, b"{}", oci.OCI_CONFIG)
    image = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {"mediaType": oci.OCI_CONFIG, "digest": str(config.digest), "size": 2},
        "layers": [],
    }
    data = json.dumps(image).encode()
    tag = fallback_tag(SUBJECT.digest)
    await push_manifest(client.exchange, app, data, oci.OCI_MANIFEST, tag=tag)
    with pytest.raises(FormatError):
        await push_referrer(client, app, SUBJECT, TYPE, b"x", CONTENT)
    with pytest.raises(FormatError):
        await find_referrers(client, app, SUBJECT.digest, TYPE)
    assert skopeo(docker, "inspect", f"team/app:{tag}", "--raw") == data


async def test_nothing_there(client: Registry, app: Reference) -> None:
    assert await find_referrers(client, app, SUBJECT.digest, TYPE) == []
    with pytest.raises(RegistryNotFound):
        await fetch_artifact(client, app, SUBJECT, 10)
