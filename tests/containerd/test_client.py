# SPDX-License-Identifier: Apache-2.0
"""Leases, images, snapshots, diff and errors, against a real containerd; checked with ctr."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from lazysnap.containerd.client import Containerd
from lazysnap.containerd.snapshots import COMMITTED
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, ContainerdError, InvalidArgument, NotFound, Unavailable
from lazysnap.oci import OCI_LAYER_GZIP, Descriptor
from tests.support.containerd import PrivateContainerd
from tests.support.images import busybox_layers
from tests.support.views import make_view

pytestmark = [pytest.mark.root, pytest.mark.containerd]


async def test_version_is_that_of_ctr(daemon: PrivateContainerd, client: Containerd) -> None:
    assert await client.version() in daemon.ctr("version")


async def test_plugins_are_those_of_ctr(daemon: PrivateContainerd, client: Containerd) -> None:
    rows = [line.split() for line in daemon.ctr("plugins", "ls").splitlines()[1:]]
    found = {(plugin.type, plugin.id): plugin for plugin in await client.plugins()}
    assert set(found) == {(row[0], row[1]) for row in rows}
    assert all(not found[row[0], row[1]].error for row in rows if row[-1] == "ok")
    assert all(found[row[0], row[1]].error for row in rows if row[-1] == "error")
    overlayfs = found["io.containerd.snapshotter.v1", "overlayfs"]
    assert overlayfs.exports["root"].startswith(str(daemon.directory))


@pytest.mark.parametrize("kind", ["absent", "not-listening", "too-long"])
async def test_a_dead_socket_says_what_to_do(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 200 if kind == "too-long" else "c.sock")
    if kind == "not-listening":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    with pytest.raises(ContainerdError) as caught:
        async with Containerd(str(path)):
            pass
    assert str(path) in caught.value.message
    assert caught.value.hint


async def test_containerd_gone_under_way(daemon: PrivateContainerd, client: Containerd) -> None:
    await client.version()
    daemon.kill()
    with pytest.raises(ContainerdError, match="nobody listens") as caught:
        await client.version()
    assert caught.value.reason == "no-containerd"
    daemon.start()
    while True:  # grpcio reconnects after at most a second; each call waits for its answer
        try:
            await client.version()
        except Unavailable:
            await trio.sleep(0.05)
        else:
            break


async def test_a_lease_holds_and_is_deleted_also_on_failure(
    daemon: PrivateContainerd, client: Containerd
) -> None:
    async with client.lease() as leased:
        await leased.content.write("a", b"kept", Digest.of(b"kept"), {})
        [name] = daemon.leases()
        assert name.startswith("lazysnap-")
        assert "gc.expire=" in daemon.ctr("leases", "ls")
    assert daemon.leases() == []
    with pytest.raises(ZeroDivisionError):
        async with client.lease():
            raise ZeroDivisionError
    assert daemon.leases() == []
    with trio.CancelScope() as scope:
        async with client.lease():
            scope.cancel()
            await trio.sleep_forever()
    assert daemon.leases() == []


async def test_a_layer_is_unpacked_into_a_snapshot(
    daemon: PrivateContainerd, leased: Containerd, tmp_path: Path
) -> None:
    layer = busybox_layers()[0]
    snapshots = leased.snapshots("overlayfs")
    await leased.content.write("l", layer.blob, layer.digest, {"a": "b"})
    labels = {"containerd.io/gc.root": "x", "other": "y"}
    mounts = await snapshots.prepare("key 1", "", labels)
    descriptor = Descriptor(OCI_LAYER_GZIP, Digest(layer.digest), len(layer.blob))
    assert await leased.apply(descriptor, mounts) == layer.diff_id
    with pytest.raises(AlreadyExists):
        await snapshots.prepare("key 1", "", {})
    await snapshots.commit(layer.diff_id, "key 1", labels)
    info = await snapshots.stat(layer.diff_id)
    assert (info.kind, info.parent, info.labels) == (COMMITTED, "", labels)
    assert daemon.snapshots() == {layer.diff_id: ("", "Committed")}
    assert [found.name for found in await snapshots.walk("kind==committed")] == [layer.diff_id]
    await trio.to_thread.run_sync(make_view, daemon.address, "overlayfs", "v", layer.diff_id)
    command = daemon.ctr("snapshots", "mounts", str(tmp_path), "v")
    await trio.run_process(["sh", "-c", command])
    try:
        assert (tmp_path / "bin/busybox").read_bytes() == Path("/bin/busybox").read_bytes()
    finally:
        await trio.run_process(["umount", str(tmp_path)])


async def test_errors_have_their_classes(client: Containerd) -> None:
    snapshots = client.snapshots("overlayfs")
    with pytest.raises(NotFound):
        await snapshots.stat("nothing")
    with pytest.raises(NotFound):
        await snapshots.prepare("key", "no parent", {})
    with pytest.raises(InvalidArgument):
        await snapshots.prepare("key", "", {"k": "v" * 5000})
    with pytest.raises(InvalidArgument):
        await client.snapshots("no such snapshotter").stat("key")
    with pytest.raises(NotFound):
        await client.image("nothing")


async def test_an_image_is_created_and_then_updated(
    daemon: PrivateContainerd, leased: Containerd
) -> None:
    for text in (b"{}", b"{ }"):
        digest = Digest.of(text)
        await leased.content.write("m", text, digest, {})
        await leased.set_image("localhost/a:1", Descriptor("some/type", digest, len(text)))
        assert daemon.images() == {"localhost/a:1": ("some/type", digest)}
        if text == b"{}":
            daemon.ctr("images", "label", "localhost/a:1", "mine=stays")
    image = await leased.image("localhost/a:1")
    assert image.labels == {"mine": "stays"}
    assert await leased.images() == [image]


async def test_namespaces_are_apart(daemon: PrivateContainerd, leased: Containerd) -> None:
    await leased.content.write("m", b"x", Digest.of(b"x"), {})
    async with Containerd(daemon.address, "other") as other:
        assert await other.content.walk() == []
        assert not await other.content.exists(Digest.of(b"x"))
    assert await leased.namespaces() == ["default"]
