# SPDX-License-Identifier: Apache-2.0
"""Pulls into a real containerd with its own snapshotter overlayfs, where no layer is lazy.

What comes out is compared with what `ctr images pull` leaves of the same image, and run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from lazysnap.containerd.client import Containerd
from lazysnap.errors import DigestMismatch, RegistryError, RegistryNotFound
from lazysnap.pull.progress import LayerState, Progress, PullResult
from lazysnap.pull.puller import pull
from lazysnap.reference import Reference
from lazysnap.registry import Registry
from tests.pull.conftest import AMD64, serve
from tests.support.containerd import PrivateContainerd
from tests.support.docker_registry import DockerRegistry, docker_registry
from tests.support.images import (
    Layer,
    busybox_layers,
    busybox_tars,
    gzip_layer,
    push,
    write_layout,
)
from tests.support.registry import Break, FaultyRegistry, Status

pytestmark = [pytest.mark.root, pytest.mark.containerd]

PAYLOAD = random.Random(2).randbytes(9 << 20)


@pytest.fixture
def debian_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    with docker_registry(tmp_path) as registry:
        yield registry


def assert_nothing_left(daemon: PrivateContainerd) -> None:
    assert daemon.snapshots() == {}
    assert daemon.leases() == []
    assert daemon.ingests() == []
    assert daemon.images() == {}
    assert daemon.contents() == {}


@pytest.mark.parametrize("index", [False, True])
async def test_it_leaves_what_ctr_leaves_and_runs(
    tmp_path: Path,
    daemon: PrivateContainerd,
    debian_registry: DockerRegistry,
    registry: Registry,
    index: bool,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD), index=index)
    text = push(layout, debian_registry.host, "some/app", "1")
    async with Containerd(daemon.address, "ours") as client:
        result = await pull(Reference.parse(text), client, registry, "overlayfs", AMD64)
    assert [layer.state for layer in result.layers] == [LayerState.UNPACKED] * 3
    assert result.bytes_downloaded == sum(len(layer.blob) for layer in layout.layers)
    assert (result.digest, result.manifest) == (layout.target, layout.manifest)
    pull_by_ctr = ("images", "pull", "--plain-http", text)
    await trio.to_thread.run_sync(partial(daemon.ctr, *pull_by_ctr, namespace="theirs"))
    ours, theirs = (_state(daemon, namespace) for namespace in ("ours", "theirs"))
    assert ours == theirs
    assert len(ours["contents"]) == (6 if index else 5)
    daemon.namespace = "ours"
    output = daemon.run(
        text, "/bin/sh", "-c", "cat /data/hello; sha256sum </data/payload; ls /data"
    )
    digest = layout.layers[1]  # what the layer says is what the container reads
    assert output.startswith("hello from the top layer\n")
    assert "gone" not in output
    assert digest.diff_id in ours["contents"][digest.digest].values()


def _state(daemon: PrivateContainerd, namespace: str) -> dict[str, dict[str, Any]]:
    daemon.namespace = namespace
    assert daemon.leases() == daemon.ingests() == []
    return {
        "contents": dict(daemon.contents()),
        "images": dict(daemon.images()),
        "snapshots": dict(daemon.snapshots()),
    }


class _Ends(Progress):
    """Tells when all layers have come to their end."""

    def __init__(self, layers: int) -> None:
        self.ended = trio.Event()
        self._left = layers

    def state(self, layer: int, state: LayerState) -> None:
        self._left -= state is LayerState.UNPACKED
        if not self._left:
            self.ended.set()


async def test_an_image_is_not_there_before_its_documents(
    tmp_path: Path, client: Containerd, server: FaultyRegistry, registry: Registry
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers())
    reference = serve(server, layout)
    manifest = json.loads(
        (layout.path / "blobs/sha256" / layout.manifest.removeprefix("sha256:")).read_bytes()
    )
    config = manifest["config"]["digest"]
    ends = _Ends(len(layout.layers))
    results = []

    async def work() -> None:
        results.append(await pull(reference, client, registry, "overlayfs", AMD64, progress=ends))

    # Another client is at it, so that ours has to wait.
    other = client.content.writer(f"config-{config}", config, manifest["config"]["size"])
    async with trio.open_nursery() as nursery, other:
        nursery.start_soon(work)
        await ends.ended.wait()
        assert not results
        assert await client.images() == []
    assert [layer.state for layer in results[0].layers] == [LayerState.UNPACKED] * 3
    assert [image.name for image in await client.images()] == [reference.name]
    assert (await client.content.info(config)).size == manifest["config"]["size"]


async def test_a_second_pull_fetches_no_layer(
    tmp_path: Path, client: Containerd, server: FaultyRegistry, registry: Registry
) -> None:
    reference = serve(server, write_layout(tmp_path / "image", busybox_layers()))
    await pull(reference, client, registry, "overlayfs", AMD64)
    server.log.clear()
    result = await pull(reference, client, registry, "overlayfs", AMD64)
    assert [layer.state for layer in result.layers] == [LayerState.PRESENT] * 3
    assert result.bytes_downloaded == 0
    assert len(server.requests("registry", "/blobs/")) == 1  # the configuration


async def test_content_that_is_there_is_not_fetched_for_another_snapshotter(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    reference = serve(server, write_layout(tmp_path / "image", busybox_layers()))
    await pull(reference, client, registry, "overlayfs", AMD64)
    result = await pull(reference, client, registry, "native", AMD64)
    assert [layer.state for layer in result.layers] == [LayerState.UNPACKED] * 3
    assert result.bytes_downloaded == 0
    config = [
        labels for labels in daemon.contents().values() if any("snapshot" in k for k in labels)
    ]
    assert {k.rpartition(".")[2] for k in config[0] if "snapshot" in k} == {"overlayfs", "native"}


async def test_repositories_of_a_blob_are_collected(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers())
    for repository in ("b", "a"):
        reference = serve(server, layout, repository)
        await pull(reference, client, registry, "overlayfs", AMD64)
    info = await client.content.info(layout.config)
    assert info.labels["containerd.io/distribution.source.127.0.0.1"] == "a,b"


async def test_the_same_layer_twice(
    tmp_path: Path, client: Containerd, server: FaultyRegistry, registry: Registry
) -> None:
    base, *_ = busybox_layers()
    empty = gzip_layer(b"\0" * 10240)
    layout = write_layout(tmp_path / "image", [base, empty, empty, empty])
    result = await pull(serve(server, layout), client, registry, "overlayfs", AMD64)
    assert len(result.layers) == 4
    assert result.bytes_downloaded == len(base.blob) + len(empty.blob)


async def test_concurrent_pulls_of_one_image(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD))
    reference = serve(server, layout)
    results: list[PullResult] = []

    async def one() -> None:
        results.append(await pull(reference, client, registry, "overlayfs", AMD64))

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
    total = sum(len(layer.blob) for layer in layout.layers)
    assert sum(result.bytes_downloaded for result in results) == total
    assert {kind for _, kind in daemon.snapshots().values()} == {"Committed"}
    assert (daemon.leases(), daemon.ingests()) == ([], [])


async def test_a_broken_connection_is_resumed(
    tmp_path: Path, client: Containerd, server: FaultyRegistry, registry: Registry
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD))
    reference = serve(server, layout)
    server.faults.append(Break(after=6 << 20, path=layout.layers[1].digest))
    result = await pull(reference, client, registry, "overlayfs", AMD64)
    assert result.bytes_downloaded == sum(len(layer.blob) for layer in layout.layers)


@pytest.mark.parametrize("layer", [0, 1, 2])
async def test_a_registry_that_fails_leaves_nothing(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
    layer: int,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD))
    reference = serve(server, layout)
    digest = layout.layers[layer].digest
    half = len(layout.layers[layer].blob) // 2
    server.faults.append(Break(after=half, path=digest))
    server.faults.append(Status(404, path=digest, times=1000))
    with pytest.raises(RegistryError):
        await pull(reference, client, registry, "overlayfs", AMD64)
    assert_nothing_left(daemon)


async def test_a_blob_with_other_bytes_leaves_nothing(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD))
    reference = serve(server, layout)
    digest = layout.layers[1].digest
    server.blobs[digest] = bytes(len(server.blobs[digest]))
    with pytest.raises(DigestMismatch, match="unexpected commit digest"):
        await pull(reference, client, registry, "overlayfs", AMD64)
    assert_nothing_left(daemon)


async def test_a_wrong_diff_id_leaves_nothing(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    base, data, top = busybox_layers()
    lying = Layer(data.blob, "sha256:" + "1" * 64)
    reference = serve(server, write_layout(tmp_path / "image", [base, lying, top]))
    with pytest.raises(DigestMismatch, match="configuration"):
        await pull(reference, client, registry, "overlayfs", AMD64)
    assert_nothing_left(daemon)


@pytest.mark.parametrize("state", list(LayerState)[1:5])
async def test_a_cancelled_pull_leaves_nothing(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
    state: LayerState,
) -> None:
    reference = serve(server, write_layout(tmp_path / "image", busybox_layers(PAYLOAD)))

    class Cancelling(Progress):
        def state(self, layer: int, reached: LayerState) -> None:
            if layer == 1 and reached is state:
                scope.cancel()

    with trio.CancelScope() as scope:
        await pull(reference, client, registry, "overlayfs", AMD64, progress=Cancelling())
    assert scope.cancelled_caught
    assert_nothing_left(daemon)


async def test_an_interrupted_download_of_another_is_resumed(
    tmp_path: Path,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD))
    reference = serve(server, layout)
    layer = layout.layers[1]
    async with client.content.writer(
        f"layer-{layer.digest}", layer.digest, len(layer.blob)
    ) as writer:
        await writer.write(layer.blob[: 5 << 20])
        writer.keep()
    result = await pull(reference, client, registry, "overlayfs", AMD64)
    total = sum(len(layer.blob) for layer in layout.layers)
    assert result.bytes_downloaded == total - (5 << 20)


async def test_a_damaged_download_of_another_is_begun_again(
    tmp_path: Path,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(PAYLOAD))
    reference = serve(server, layout)
    layer = layout.layers[1]
    async with client.content.writer(
        f"layer-{layer.digest}", layer.digest, len(layer.blob)
    ) as writer:
        await writer.write(bytes(5 << 20))
        writer.keep()
    result = await pull(reference, client, registry, "overlayfs", AMD64)
    assert [layer.state for layer in result.layers] == [LayerState.UNPACKED] * 3


async def test_an_absent_image_or_platform(
    tmp_path: Path,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    reference = serve(server, write_layout(tmp_path / "image", busybox_layers()))
    with pytest.raises(RegistryNotFound):
        await pull(reference.with_tag("other"), client, registry, "overlayfs", AMD64)
    arm = type(AMD64)("linux", "arm64")
    with pytest.raises(RegistryNotFound):
        await pull(reference, client, registry, "overlayfs", arm)
    assert_nothing_left(daemon)


def test_the_image_is_what_it_should_be(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "image", [gzip_layer(tar) for tar in busybox_tars()])
    config = json.loads(
        (layout.path / "blobs/sha256" / layout.config.removeprefix("sha256:")).read_bytes()
    )
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in layout.layers]
