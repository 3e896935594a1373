# SPDX-License-Identifier: Apache-2.0
"""Pulls with a remote snapshotter behind a real containerd: what is lazy is never downloaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from lazysnap.containerd.client import Containerd
from lazysnap.digest import Digest
from lazysnap.errors import InvalidArgument, NotFound, Unavailable
from lazysnap.labels import parse_remote_request
from lazysnap.oci import Descriptor
from lazysnap.pull.progress import LayerState
from lazysnap.pull.puller import pull
from lazysnap.pull.unpack import can_be_lazy
from lazysnap.reference import Reference
from lazysnap.registry import Registry
from tests.pull.conftest import AMD64, serve
from tests.support.containerd import PrivateContainerd, private_containerd
from tests.support.images import Layer, busybox_layers, busybox_tars, gzip_layer, write_layout
from tests.support.registry import Break, FaultyRegistry
from tests.support.remote import RemoteSnapshotter

pytestmark = [pytest.mark.root, pytest.mark.containerd]

TOC = {"containerd.io/snapshot/stargz/toc.digest": "sha256:" + "5" * 64}
LAZY, UNPACKED, PRESENT = LayerState.LAZY, LayerState.UNPACKED, LayerState.PRESENT


@pytest.fixture
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteSnapshotter]:
    with RemoteSnapshotter(tmp_path_factory.mktemp("r")) as remote:
        yield remote


@pytest.fixture
def daemon(
    tmp_path_factory: pytest.TempPathFactory, remote: RemoteSnapshotter
) -> Iterator[PrivateContainerd]:
    path = tmp_path_factory.mktemp("c")
    with private_containerd(path, proxies={"remote": remote.address}) as containerd:
        yield containerd


def image(
    tmp_path: Path, server: FaultyRegistry, annotated: Sequence[bool]
) -> tuple[Reference, list[Layer]]:
    """The busybox image, with a TOC digest on some of its layers."""
    layers = [
        replace(layer, annotations=TOC) if lazy else layer
        for layer, lazy in zip(busybox_layers(bytes(5 << 20)), annotated, strict=True)
    ]
    return serve(server, write_layout(tmp_path / "image", layers)), layers


def offer(remote: RemoteSnapshotter, layers: Sequence[Layer], lazy: Sequence[bool]) -> None:
    tars = busybox_tars(bytes(5 << 20))
    for layer, tar, wanted in zip(layers, tars, lazy, strict=True):
        if wanted:
            remote.layers[layer.digest] = tar


@pytest.mark.parametrize(
    "lazy",
    [(True, True, True), (False, True, True), (True, False, True), (False, False, False)],
)
async def test_only_what_is_not_lazy_is_downloaded(
    tmp_path: Path,
    remote: RemoteSnapshotter,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
    lazy: tuple[bool, bool, bool],
) -> None:
    # The snapshotter may decline what looks lazy: then every layer has the annotation.
    reference, layers = image(tmp_path, server, lazy if any(lazy) else (True, True, True))
    offer(remote, layers, lazy)
    remote.reason = "because"
    result = await pull(reference, client, registry, "remote", AMD64)
    assert [layer.state for layer in result.layers] == [LAZY if yes else UNPACKED for yes in lazy]
    assert [layer.reason for layer in result.layers] == [None if yes else "because" for yes in lazy]
    assert result.lazy_layers == sum(lazy)
    for layer, yes in zip(layers, lazy, strict=True):
        assert len(server.requests("registry", layer.digest)) == (0 if yes else 1)
        assert (layer.digest in daemon.contents()) is not yes
    output = daemon.run(reference.name, "/bin/cat", "/data/hello", snapshotter="remote")
    assert output == "hello from the top layer\n"
    server.log.clear()
    again = await pull(reference, client, registry, "remote", AMD64)
    assert [layer.state for layer in again.layers] == [LAZY if yes else PRESENT for yes in lazy]
    assert (daemon.leases(), daemon.ingests()) == ([], [])


async def test_labels_tell_the_snapshotter_all_it_needs(
    tmp_path: Path,
    remote: RemoteSnapshotter,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    reference, layers = image(tmp_path, server, (True, True, True))
    offer(remote, layers, (True, True, True))
    result = await pull(reference, client, registry, "remote", AMD64)
    assert len(remote.prepared) == 3
    for number, (layer, labels) in enumerate(zip(layers, remote.prepared, strict=True)):
        request = parse_remote_request(labels)
        assert request is not None
        assert request.reference == reference.name
        assert request.layer_digest == layer.digest
        assert request.layer_size == len(layer.blob)
        assert request.media_type == layer.media_type
        assert request.manifest_digest == result.manifest
        assert request.upper_layers == tuple(upper.digest for upper in layers[number + 1 :])
        assert request.toc_digest == next(iter(TOC.values()))


async def test_a_download_of_what_turns_out_lazy_is_called_off(
    tmp_path: Path,
    remote: RemoteSnapshotter,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    # A snapshotter that takes unverified layers: nothing in the manifest says these are lazy.
    reference, layers = image(tmp_path, server, (False, False, False))
    offer(remote, layers, (True, True, True))
    server.faults.append(Break(after=1 << 10, how="stall", path=layers[1].digest))
    stalled = threading.Event()

    def wait(labels: Mapping[str, str]) -> None:
        # Nothing is downloaded before the first answer.
        if labels["containerd.io/snapshot/cri.layer-digest"] == layers[1].digest:
            assert stalled.wait(120)

    remote.on_prepare = wait

    async def release() -> None:
        await server.stalled.wait()
        stalled.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release)
        result = await pull(reference, client, registry, "remote", AMD64)
    assert result.lazy_layers == 3
    assert (daemon.leases(), daemon.ingests()) == ([], [])


async def test_a_lying_snapshotter_fails_the_pull_and_leaves_nothing(
    tmp_path: Path,
    remote: RemoteSnapshotter,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    reference, layers = image(tmp_path, server, (True, True, True))
    offer(remote, layers, (True, True, True))
    remote.lies = True
    with pytest.raises(NotFound, match="backend"):
        await pull(reference, client, registry, "remote", AMD64)
    assert daemon.images() == {}
    assert daemon.snapshots("remote") == {}
    assert (daemon.leases(), daemon.ingests()) == ([], [])


async def test_a_prepare_that_hangs_can_be_cancelled(
    tmp_path: Path,
    remote: RemoteSnapshotter,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
) -> None:
    reference, _ = image(tmp_path, server, (True, True, True))
    go_on = threading.Event()
    hanging = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def hang(labels: Mapping[str, str]) -> None:
        token.run_sync_soon(hanging.set)
        go_on.wait(120)

    remote.on_prepare = hang
    try:
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pull, reference, client, registry, "remote", AMD64)
                await hanging.wait()
                nursery.cancel_scope.cancel()
    finally:
        go_on.set()
    assert daemon.snapshots("remote") == {}
    assert (daemon.leases(), daemon.ingests(), daemon.images()) == ([], [], {})


@pytest.mark.parametrize("name", ["none", "dead"])
async def test_a_snapshotter_that_is_not_there(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    server: FaultyRegistry,
    registry: Registry,
    name: str,
) -> None:
    reference, _ = image(tmp_path, server, (True, False, True))
    path = tmp_path_factory.mktemp("d")
    with private_containerd(path, proxies={"dead": path / "dead.sock"}) as daemon:
        async with Containerd(daemon.address) as client:
            with pytest.raises((InvalidArgument, Unavailable)) as caught:
                await pull(reference, client, registry, name, AMD64)
        assert f"proxy_plugins.{name}" in (caught.value.hint or "")
        assert (daemon.leases(), daemon.ingests(), daemon.images()) == ([], [], {})


def test_can_be_lazy() -> None:
    plain = gzip_layer(b"")
    for media_type, said, expected in [
        (plain.media_type, {}, False),
        (plain.media_type, TOC, True),
        ("application/vnd.oci.image.layer.v1.tar+zstd", {}, True),
        ("application/vnd.oci.image.layer.v1.tar", TOC, False),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", {}, False),
    ]:
        blob = Descriptor(media_type, Digest(plain.digest), 1, said)
        assert can_be_lazy(blob) is expected, (media_type, said)
