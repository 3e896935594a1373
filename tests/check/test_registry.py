# SPDX-License-Identifier: Apache-2.0
"""Registries, clocks, credentials and images, with scripted servers."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from lazysnap import oci
from lazysnap.check import image, registry
from lazysnap.check.finding import Finding, Level
from lazysnap.check.registry import expiry, judge_credential
from lazysnap.credentials.docker_config import Credential
from lazysnap.digest import Digest
from lazysnap.reference import Reference
from lazysnap.registry.hosts import RegistrySettings
from tests.check.scene import Scene, look
from tests.support import layers
from tests.support.registry import FaultyRegistry, Headers, Ranges, Status, faulty_registry

PROBES = (*registry.PROBES, *image.PROBES)
MANY = 1000


@pytest.fixture
async def server() -> AsyncIterator[FaultyRegistry]:
    async with faulty_registry() as server:
        yield server


@pytest.fixture
def scene(tmp_path: Path, server: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A root with a layer of an image that the server has."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("DOCKER_AUTH_CONFIG", raising=False)
    it = Scene(tmp_path)
    it.context = replace(it.context, registry=RegistrySettings(retry_seconds=30))
    it.lazy("lazy", f"{server.host}/r/app:1", server.add_blob(b"a layer"))
    return it


async def _found(scene: Scene, probe: str) -> list[Finding]:
    return await look(scene.context, PROBES, probe)


async def test_all_is_well(scene: Scene) -> None:
    for probe in PROBES:
        assert await _found(scene, probe.id) == []


async def test_a_registry_that_refuses(scene: Scene, server: FaultyRegistry) -> None:
    server.faults.append(Status(403, {}, times=MANY))
    (found,) = await _found(scene, "registries")
    assert found.level is Level.FAILURE
    assert "docker login" in found.hint


async def test_a_layer_that_the_registry_has_no_more(scene: Scene, server: FaultyRegistry) -> None:
    server.blobs.clear()
    (found,) = await _found(scene, "registries")
    assert (found.level, "404" in found.summary) == (Level.WARNING, True)


async def test_a_registry_that_is_away(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PROBE_SECONDS", 0.2)
    for name in ("one", "two"):
        scene.lazy(name, f"127.0.0.1:9/r/{name}:1")  # the discard port: nobody listens
    found = [f for f in await _found(scene, "registries") if "127.0.0.1:9 " in f.summary]
    assert [finding.level for finding in found] == [Level.WARNING]


@pytest.mark.parametrize(
    ("seconds", "age", "says"),
    [(0, "0", ""), (-300, "300", ""), (-300, "0", "before"), (300, "0", "behind")],
)
async def test_clocks(
    scene: Scene, server: FaultyRegistry, seconds: int, age: str, says: str
) -> None:
    date = formatdate(time.time() + seconds, usegmt=True)
    server.faults.append(Headers({"Date": date, "Age": age}, times=MANY))
    found = await _found(scene, "clock")
    assert [finding.level for finding in found] == [Level.WARNING] * bool(says)
    assert all(says in finding.summary for finding in found)


@pytest.mark.parametrize("date", ["yesterday", "", "Thu, 99 Jan 1970 00:00:00 GMT"])
async def test_a_date_that_is_none(scene: Scene, server: FaultyRegistry, date: str) -> None:
    server.faults.append(Headers({"Date": date}, times=MANY))
    assert await _found(scene, "clock") == []


def _jwt(**claims: object) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part(claims)}.c2ln"


def _log_in(tmp_path: Path, host: str, entry: dict[str, str]) -> None:
    (tmp_path / "docker").mkdir(exist_ok=True)
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {host: entry}}))


@pytest.mark.parametrize(
    ("left", "level"),
    [(-60, Level.FAILURE), (600, Level.WARNING), (7 * 86400, None)],
)
@pytest.mark.parametrize("kind", ["auth", "identitytoken", "registrytoken"])
async def test_credentials(
    scene: Scene, server: FaultyRegistry, tmp_path: Path, left: int, level: Level | None, kind: str
) -> None:
    token = _jwt(exp=int(time.time()) + left)
    if kind == "auth":
        token = base64.b64encode(f"user:{token}".encode()).decode()
    _log_in(tmp_path, server.host, {kind: token})
    found = await _found(scene, "credentials")
    assert [finding.level for finding in found] == ([] if level is None else [level])
    assert all(token not in finding.summary + finding.detail for finding in found)


async def test_credentials_of_hosts_that_are_not_used(scene: Scene, tmp_path: Path) -> None:
    _log_in(tmp_path, "other.example", {"registrytoken": _jwt(exp=1)})
    assert await _found(scene, "credentials") == []
    scene.context = replace(scene.context, image=Reference.parse("other.example/x:1"))
    assert len(await _found(scene, "credentials")) == 1


@pytest.mark.parametrize(
    "token",
    ["", "password", "a.b.c", "..", f"x.{base64.urlsafe_b64encode(b'[]').decode()}.y", "é.é.é"],
)
def test_what_is_no_token_has_no_end(token: str) -> None:
    assert expiry(token) is None
    assert list(judge_credential("h", Credential("user", token), 0.0)) == []


def test_a_token_without_end() -> None:
    assert expiry(_jwt(sub="x")) is None
    assert expiry(_jwt(exp="soon")) is None
    assert expiry(_jwt(exp=1.5)) == 1.5


# -- images -----------------------------------------------------------------------------------------


def _push(server: FaultyRegistry, made: Sequence[layers.Layer]) -> Reference:
    config = {
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in made]},
    }
    data = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {
            "mediaType": oci.OCI_CONFIG,
            "digest": server.add_blob(data),
            "size": len(data),
        },
        "layers": [
            {
                "mediaType": layer.media_type,
                "digest": server.add_blob(layer.blob),
                "size": len(layer.blob),
                "annotations": layer.annotations,
            }
            for layer in made
        ],
    }
    server.add_manifest("r/app", "1", oci.OCI_MANIFEST, json.dumps(manifest).encode())
    return Reference.parse(f"{server.host}/r/app:1")


ENTRIES = [layers.file("file", b"content")]


async def test_an_image_tells_which_layers_would_be_lazy(
    scene: Scene, server: FaultyRegistry, tmp_path: Path
) -> None:
    made = [layers.estargz(ENTRIES), layers.plain(ENTRIES), layers.zstd_chunked(ENTRIES)]
    forged = layers.estargz([layers.file("other")])
    forged.annotations[layers.TOC_DIGEST] = Digest.of(b"something else")
    scene.context = replace(scene.context, image=_push(server, [*made, forged]))
    before = sorted(tmp_path.rglob("*"))
    found = await _found(scene, "image")
    levels = [Level.INFO, Level.WARNING, Level.INFO, Level.WARNING]
    assert [finding.level for finding in found] == levels
    assert "no-toc-digest" in found[1].summary
    assert "convert" in found[1].hint
    assert "digest-mismatch" in found[3].summary
    for layer, finding in zip([*made, forged], found, strict=True):
        assert Digest.of(layer.blob) in finding.summary
    assert sorted(tmp_path.rglob("*")) == before
    scene.context = replace(scene.context, lazy=False)
    assert "switched off" in (await _found(scene, "image"))[-1].summary


async def test_an_image_in_a_registry_without_ranges(scene: Scene, server: FaultyRegistry) -> None:
    content = random.Random(1).randbytes(400_000)  # more than a tail, and not compressible
    made = layers.estargz([layers.file("file", content)])
    scene.context = replace(scene.context, image=_push(server, [made]))
    server.faults.append(Ranges("ignore", path=str(Digest.of(made.blob)), times=MANY))
    (found,) = await _found(scene, "image")
    assert (found.level, "no-ranges" in found.summary) == (Level.WARNING, True)
    assert "Range requests" in found.hint


async def test_an_image_that_is_not_there(scene: Scene, server: FaultyRegistry) -> None:
    missing = Reference.parse(f"{server.host}/r/app:other")
    scene.context = replace(scene.context, image=missing)
    (found,) = await _found(scene, "image")
    assert (found.level, "404" in found.summary) == (Level.FAILURE, True)
    assert found.hint
