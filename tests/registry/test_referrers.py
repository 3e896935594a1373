# SPDX-License-Identifier: Apache-2.0
"""Artifacts in a registry with the referrers API, and in hostile ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import (
    DigestMismatch,
    FormatError,
    InvalidArgument,
    RegistryError,
    RegistryUnreachable,
    Unauthorized,
)
from lazysnap.reference import Reference
from lazysnap.registry import Registry, fetch_artifact, find_referrers, push_referrer
from lazysnap.registry.referrers import fallback_tag
from tests.registry.conftest import SETTINGS
from tests.support.registry import FaultyRegistry, Headers, Status, faulty_registry

TYPE = "application/vnd.example.profile+one"
CONTENT = "application/octet-stream"
SUBJECT = oci.Descriptor(media_type=oci.OCI_MANIFEST, digest=Digest.of(b"an image"), size=8)
TAG = fallback_tag(SUBJECT.digest)
LIST = {"Content-Type": oci.OCI_INDEX}


async def push(
    registry: Registry, reference: Reference, payload: bytes, kind: str = TYPE
) -> oci.Descriptor:
    return await push_referrer(registry, reference, SUBJECT, kind, payload, CONTENT, {"n": "v"})


async def find(registry: Registry, reference: Reference) -> list[oci.Descriptor]:
    with trio.fail_after(120):
        return await find_referrers(registry, reference, SUBJECT.digest, TYPE)


def index(*manifests: Any, **members: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": manifests, **members}).encode()


def test_fallback_tags() -> None:
    assert fallback_tag(Digest.parse("sha256:" + "a" * 64)) == "sha256-" + "a" * 64
    assert fallback_tag(Digest.parse("sha512:" + "b" * 128)) == "sha512-" + "b" * 64


@pytest.mark.parametrize("applies_filter", [True, False])
@pytest.mark.parametrize("page", [1, 2, 100])
async def test_api(
    server: FaultyRegistry,
    registry: Registry,
    image: Reference,
    applies_filter: bool,
    page: int,
) -> None:
    server.uploads.has_referrers = True
    server.uploads.applies_filter = applies_filter
    server.uploads.page = page
    pushed = [await push(registry, image, b"%d" % n) for n in range(3)]
    await push(registry, image, b"other", TYPE + ".v2")
    # The registry keeps the list, we do not.
    assert not any(name.startswith("sha256-") for _, name in server.manifests)
    before = len(server.log)
    assert await find(registry, image) == pushed
    entries = 3 if applies_filter else 4
    assert len(server.log) - before == -(-entries // page)
    assert all("/referrers/" in r.path for r in server.log[before:])
    assert "artifactType=application%2Fvnd.example.profile%2Bone" in server.log[before].query
    found = [await fetch_artifact(registry, image, d, 1, subject=SUBJECT.digest) for d in pushed]
    assert found == [b"0", b"1", b"2"]


async def test_fallback_when_the_registry_does_not_confirm_the_subject(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    server.uploads.has_referrers = True
    lie = Headers(headers={"OCI-Subject": Digest.of(b"other")}, path="/manifests/")
    server.faults.append(lie)
    await push(registry, image, b"x")
    assert ("team/app", TAG) in server.manifests


@pytest.mark.parametrize(
    "answer",
    [
        Status(400),
        Status(404),
        Status(405),
        Status(501),
        Status(200, {"Content-Type": "text/html"}, b"<html>Welcome</html>"),
        Status(200, {"Content-Type": "application/json"}, b"{}"),
    ],
)
async def test_registries_without_the_api(
    server: FaultyRegistry, registry: Registry, image: Reference, answer: Status
) -> None:
    pushed = await push(registry, image, b"x")
    answer.path, answer.times = "/referrers/", 1
    server.faults.append(answer)
    assert await find(registry, image) == [pushed]


async def test_login_for_the_list(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    server.auth = "bearer"
    pushed = await push(registry, image, b"x")
    assert await find(registry, image) == [pushed]
    server.faults.append(Status(403, path="/referrers/"))
    with pytest.raises(Unauthorized):
        await find(registry, image)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "malformed"),
        (b"\xff" * 100, "malformed"),
        (b"[" * 100_000, "malformed"),
        (index({"mediaType": "x", "digest": "sha256:../../x", "size": 1}), "not a digest"),
        (index({"mediaType": "x", "digest": str(SUBJECT.digest), "size": -1}), "malformed"),
        (index(mediaType=oci.DOCKER_LIST), "expected a list of referrers"),
        (b'{"schemaVersion": 2, "config": {}, "manifests": []}', "both"),
    ],
)
@pytest.mark.parametrize("api", [True, False])
async def test_malformed_lists(
    server: FaultyRegistry,
    registry: Registry,
    image: Reference,
    body: bytes,
    message: str,
    api: bool,
) -> None:
    server.faults.append(Status(200, LIST, body, path="/referrers/" if api else "/manifests/"))
    with pytest.raises(FormatError, match=message):
        await find(registry, image)
    if not api:
        # Nor is it overwritten by who pushes.
        server.manifests["team/app", TAG] = (oci.OCI_INDEX, body)
        with pytest.raises(FormatError, match=message):
            await push(registry, image, b"x")
        assert server.manifests["team/app", TAG][1] == body


async def test_entries_that_are_not_wanted(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    good = {
        "mediaType": oci.OCI_MANIFEST,
        "digest": str(SUBJECT.digest),
        "size": 8,
        "artifactType": TYPE,
    }
    untyped = {k: v for k, v in good.items() if k != "artifactType"}
    others = [good | {"artifactType": TYPE + "x"}, good | {"mediaType": oci.OCI_INDEX}, untyped]
    server.faults.append(Status(200, LIST, index(*others, good, good), path="/referrers/"))
    (found,) = await find(registry, image)
    assert (found.digest, found.artifact_type) == (SUBJECT.digest, TYPE)
    server.faults.append(Status(200, LIST, b'{"schemaVersion":2,"manifests":null}'))
    assert await find(registry, image) == []


@pytest.mark.parametrize("link", ["same", "/v2/team/app/referrers/x?artifactType=again"])
async def test_lists_without_end(
    server: FaultyRegistry, registry: Registry, image: Reference, link: str
) -> None:
    path = f"/v2/team/app/referrers/{SUBJECT.digest}" if link == "same" else link
    header = LIST | {"Link": f'<{path}>; rel="next"'}
    server.faults.append(Status(200, header, index(), path="/referrers/", times=1000))
    with pytest.raises(RegistryError, match="more than 32 pages"):
        await find(registry, image)
    assert len(server.log) == 32


async def test_large_lists(server: FaultyRegistry, registry: Registry, image: Reference) -> None:
    body = index(annotations={"x": "y" * (5 << 20)})
    header = LIST | {"Link": '<?last=1>; rel="next"'}
    server.faults.append(Status(200, header, body, path="/referrers/", times=1000))
    with pytest.raises(RegistryError, match="more than"):
        await find(registry, image)
    assert len(server.log) == 2


@pytest.mark.parametrize("later", [Status(404), Status(200, {"Content-Type": "text/html"})])
async def test_lists_that_break_off(
    server: FaultyRegistry, registry: Registry, image: Reference, later: Status
) -> None:
    """Half a list is not passed off as the whole one."""
    header = LIST | {"Link": '<?last=1>; rel="next"'}
    later.times, later.path = 1, "/referrers/"
    server.faults += [Status(200, header, index(), path="/referrers/"), later]
    with pytest.raises(RegistryError):
        await find(registry, image)


async def test_lists_that_go_on_elsewhere(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    async with faulty_registry() as other:
        for url in (f"http://{other.host}/v2/", "//[", "file:///etc/passwd", ""):
            header = LIST | {"Link": f'<{url}>; rel="next"'}
            server.faults.append(Status(200, header, index(), path="/referrers/"))
            with pytest.raises(RegistryError):
                await find(registry, image)
        assert not other.log


async def test_other_links_are_not_followed(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    link = '</a>; rel="prev", </b>; title="next", ' + "<" * 10_000
    server.faults.append(Status(200, LIST | {"Link": link}, index(), path="/referrers/"))
    assert await find(registry, image) == []
    assert len(server.log) == 1


async def test_what_others_have_listed_stays(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    theirs = {
        "mediaType": oci.OCI_MANIFEST,
        "digest": str(Digest.of(b"signature")),
        "size": 9,
        "artifactType": "application/vnd.example.signature",
        "data": "e30=",
        "org.example.unknown": [1, {"a": None}],
    }
    before = index(theirs, annotations={"a": "b"}, future={"x": 1})
    server.manifests["team/app", TAG] = (oci.OCI_INDEX, before)
    pushed = await push(registry, image, b"x")
    after = json.loads(server.manifests["team/app", TAG][1])
    assert after["manifests"][0] == theirs
    assert after["manifests"][1]["digest"] == pushed.digest
    assert (after["annotations"], after["future"]) == ({"a": "b"}, {"x": 1})
    assert await find(registry, image) == [pushed]


async def test_processes_that_push_at_one_time_lose_nothing_where_conditions_count(
    server: FaultyRegistry, image: Reference
) -> None:
    server.uploads.heeds_conditions = True
    pushed: list[oci.Descriptor] = []

    async def process(number: int) -> None:
        # A client of its own takes no turns with the others.
        async with Registry(SETTINGS, Anonymous()) as registry:
            pushed.append(await push(registry, image, b"%d" % number))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(process, number)
    async with Registry(SETTINGS, Anonymous()) as registry:
        found = await find(registry, image)
    assert sorted(d.digest for d in found) == sorted(d.digest for d in pushed)
    assert len(found) == 5
    assert any(r.status == 412 for r in server.log)


async def test_list_that_never_takes_the_entry(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    # Reading shows an empty list, and writing succeeds without effect.
    server.faults.append(Status(200, LIST, index(), path=TAG, times=1000))
    with trio.fail_after(120), pytest.raises(RegistryUnreachable, match="still lacks"):
        await push(registry, image, b"x")


async def test_artifact_needs_a_type(registry: Registry, image: Reference) -> None:
    with pytest.raises(InvalidArgument):
        await push(registry, image, b"x", "")


async def test_artifacts_that_are_not_what_was_listed(
    server: FaultyRegistry, registry: Registry, image: Reference
) -> None:
    pushed = await push(registry, image, b"profile")
    manifest = json.loads(server.manifests["team/app", pushed.digest][1])

    def changed(**members: Any) -> oci.Descriptor:
        data = json.dumps(manifest | members).encode()
        digest = server.add_manifest("team/app", "x", oci.OCI_MANIFEST, data)
        return oci.Descriptor(
            media_type=oci.OCI_MANIFEST, digest=digest, size=len(data), artifact_type=TYPE
        )

    layer = manifest["layers"][0]
    huge = {**layer, "size": 1 << 60}
    for descriptor, message in (
        (changed(layers=[layer, layer]), "2 layers"),
        (changed(layers=[]), "0 layers"),
        (changed(layers=[huge]), "more than 7"),
        (changed(artifactType="other"), "is of type 'other'"),
        (changed(subject=None), "does not belong"),
        (changed(subject=layer), "does not belong"),
    ):
        with pytest.raises(FormatError, match=message):
            await fetch_artifact(registry, image, descriptor, 7, subject=SUBJECT.digest)
    wrong = oci.Descriptor(media_type="x", digest=pushed.digest, size=pushed.size + 1)
    with pytest.raises(FormatError, match="bytes, not"):
        await fetch_artifact(registry, image, wrong, 7)
    large = oci.Descriptor(media_type="x", digest=pushed.digest, size=oci.MAX_DOCUMENT + 1)
    sent = len(server.log)
    with pytest.raises(FormatError):
        await fetch_artifact(registry, image, large, 7)
    assert len(server.log) == sent
    server.blobs[layer["digest"]] = b"another"
    with pytest.raises(DigestMismatch):
        await fetch_artifact(registry, image, pushed, 7)
    server.manifests["team/app", pushed.digest] = (oci.OCI_MANIFEST, b"x" * pushed.size)
    with pytest.raises(DigestMismatch):
        await fetch_artifact(registry, image, pushed, 7)
