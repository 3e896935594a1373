# SPDX-License-Identifier: Apache-2.0
"""The daemon leaves downloads to containerd that do not begin; what unpacks is a stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from lazysnap import labels, oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import RegistryUnreachable
from lazysnap.filesystem.layer_unpacker import LayerUnpacker
from lazysnap.registry import Registry, RegistrySettings
from lazysnap.unpack.applier_pool import ApplierPool
from lazysnap.unpack.process import Answer, Job
from tests.support.clocks import patient_clock
from tests.support.registry import Break, FaultyRegistry, faulty_registry
from tests.support.slow_servers import refusing


class Appliers:
    """Reads all of a layer."""

    received = 0

    async def apply(self, job: Job, blob: AsyncIterator[bytes]) -> Answer:
        async for piece in blob:
            self.received += len(piece)
        return Answer(diff_id="")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


@pytest.fixture
async def server() -> AsyncIterator[FaultyRegistry]:
    async with faulty_registry() as server:
        yield server


def _labels(host: str, digest: Digest, size: int, media_type: str = "") -> Mapping[str, str]:
    return labels.layer_labels(
        chain_id="sha256:chain",
        reference=f"{host}/image:1",
        manifest_digest=Digest.of(b"manifest"),
        layer_digests=[digest],
        size=size,
        media_type=media_type or oci.OCI_LAYER_GZIP,
        annotations={},
    )


async def test_twenty_layers_of_a_dead_registry_are_soon_left_to_containerd(
    clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    host = refusing()
    async with Registry(RegistrySettings(), Anonymous()) as registry:
        unpacker = LayerUnpacker(registry, cast(ApplierPool, Appliers()))
        for number in range(20):
            request = _labels(host, Digest.of(b"%d" % number), 10)
            layer = await unpacker.find(request)
            with pytest.raises(RegistryUnreachable):
                await unpacker.unpack(layer, str(tmp_path), [])
            with pytest.raises(RegistryUnreachable):
                await unpacker.above(request)
        assert trio.current_time() <= 6


async def test_a_download_that_has_begun_has_all_patience(
    clock: trio.testing.MockClock, server: FaultyRegistry, tmp_path: Path
) -> None:
    data = bytes(1 << 20)
    digest = server.add_blob(data)
    server.faults += [Break(after=500_000), Break(how="stall", times=4)]
    appliers = Appliers()
    async with Registry(RegistrySettings(stall_seconds=4), Anonymous()) as registry:
        unpacker = LayerUnpacker(registry, cast(ApplierPool, appliers))
        layer = await unpacker.find(_labels(server.host, digest, len(data)))
        await unpacker.unpack(layer, str(tmp_path), [])
    assert appliers.received == len(data)
    assert 15 < trio.current_time() < 25
