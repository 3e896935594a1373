# SPDX-License-Identifier: Apache-2.0
"""OCI layouts on this machine read as a registry is, from a directory and from skopeo's archive."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lazysnap.digest import Digest
from lazysnap.errors import (
    DigestMismatch,
    InvalidArgument,
    RegistryError,
    RegistryNotFound,
)
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings
from tests.support import images

_AMD64 = Platform("linux", "amd64")
_PAYLOAD = os.urandom(700_000)


@pytest.fixture
async def local() -> AsyncIterator[Registry]:
    async with Registry(RegistrySettings(local_layouts=True)) as registry:
        yield registry


@pytest.fixture
def layout(tmp_path: Path) -> images.Layout:
    return images.write_layout(
        tmp_path / "layout", images.busybox_layers(_PAYLOAD), tag="app:1", index=True
    )


def _archive(layout: images.Layout) -> str:
    target = layout.path.parent / "image.tar"
    command = ["skopeo", "copy", "--quiet", "--insecure-policy", "--preserve-digests", "--all"]
    source = f"oci:{layout.path}:{layout.tag}"
    subprocess.run([*command, source, f"oci-archive:{target}:{layout.tag}"], check=True)
    return f"oci-archive:{target}"


@pytest.mark.parametrize("form", ["oci", "oci-archive"])
async def test_an_image_is_read_in_place(local: Registry, layout: images.Layout, form: str) -> None:
    place = f"oci:{layout.path}" if form == "oci" else _archive(layout)
    for name in (place, f"{place}:app:1"):
        reference = Reference.parse(name)
        assert Reference.parse(reference.name) == reference
        image = await local.fetch_image(reference, _AMD64)
        assert image.descriptor.digest == layout.manifest
        blob = layout.layers[1]
        source = local.blob(reference, Digest.parse(blob.digest))
        assert (await source.tail(1000)).data == blob.blob[-1000:]
        assert source.size == len(blob.blob)
        assert await source.read(300_000, 300_001) == blob.blob[300_000:600_001]
        async with local.stream_blob(reference, Digest.parse(blob.digest), len(blob.blob)) as all_:
            assert b"".join([piece async for piece in all_]) == blob.blob


async def test_an_archive_that_is_replaced_is_read_anew(
    local: Registry, layout: images.Layout
) -> None:
    reference = Reference.parse(_archive(layout))
    await local.fetch_image(reference, _AMD64)
    os.unlink(reference.path)
    with tarfile.open(reference.path, "w") as archive:
        for name in sorted(os.listdir(layout.path), reverse=True):
            archive.add(layout.path / name, name)
    assert (await local.fetch_image(reference, _AMD64)).descriptor.digest == layout.manifest


async def test_names_that_are_not_there_are_told(local: Registry, layout: images.Layout) -> None:
    with pytest.raises(RegistryNotFound) as caught:
        await local.manifest(Reference.parse(f"oci:{layout.path}:other"))
    assert "app:1" in (caught.value.hint or "")
    with pytest.raises(RegistryNotFound, match=r"index\.json"):
        await local.manifest(Reference.parse("oci:/nonexistent/layout"))
    with pytest.raises(RegistryNotFound):
        await local.manifest(Reference.parse("oci-archive:/nonexistent/archive"))


async def test_damage_is_noticed(local: Registry, layout: images.Layout) -> None:
    reference = Reference.parse(f"oci:{layout.path}")
    manifest = layout.path / "blobs/sha256" / layout.manifest.removeprefix("sha256:")
    data = manifest.read_bytes()
    manifest.write_bytes(data.replace(b"schemaVersion", b"schemaversion"))
    with pytest.raises(DigestMismatch):
        await local.fetch_image(reference, _AMD64)
    blob = layout.layers[1]
    path = layout.path / "blobs/sha256" / blob.digest.removeprefix("sha256:")
    path.write_bytes(blob.blob[:-1])
    with pytest.raises(RegistryError, match="the manifest says"):
        await local.blob(reference, Digest.parse(blob.digest), len(blob.blob)).probe()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RegistryError, match="not a file"):
        await local.blob(reference, Digest.parse(blob.digest)).probe()


async def test_a_compressed_archive_is_refused(local: Registry, tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(RegistryError) as caught:
        await local.manifest(Reference.parse(f"oci-archive:{tmp_path}/image.tar"))
    assert "uncompressed" in (caught.value.hint or "")


async def test_it_must_be_allowed(layout: images.Layout) -> None:
    async with Registry() as registry:
        with pytest.raises(InvalidArgument):
            await registry.fetch_image(Reference.parse(f"oci:{layout.path}"), _AMD64)


def test_references() -> None:
    reference = Reference.parse("oci:/a/b:c/d:e")
    assert (reference.path, reference.tag, reference.is_local) == ("/a/b", "c/d:e", True)
    assert Reference.parse("oci:latest").repository == "library/oci"
    with pytest.raises(InvalidArgument):
        Reference.parse("oci:/")
