# SPDX-License-Identifier: Apache-2.0
"""A private containerd and images in registries for the tests of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lazysnap.oci import OCI_MANIFEST
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings
from tests.support.containerd_fixtures import client, daemon
from tests.support.images import Layout
from tests.support.registry import FaultyRegistry, faulty_registry

__all__ = ["AMD64", "client", "daemon", "registry", "serve", "server"]
AMD64 = Platform("linux", "amd64")


def serve(server: FaultyRegistry, layout: Layout, repository: str = "app") -> Reference:
    """Put a layout into the faulty registry."""
    for blob in (layout.path / "blobs/sha256").iterdir():
        server.add_blob(blob.read_bytes())
    manifest = layout.path / "blobs/sha256" / layout.manifest.removeprefix("sha256:")
    server.add_manifest(repository, "latest", OCI_MANIFEST, manifest.read_bytes())
    return Reference.parse(f"{server.host}/{repository}:latest")


@pytest.fixture
async def server() -> AsyncIterator[FaultyRegistry]:
    async with faulty_registry() as server:
        yield server


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with Registry(RegistrySettings(retry_seconds=30, stall_seconds=60)) as registry:
        yield registry
