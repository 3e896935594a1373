# SPDX-License-Identifier: Apache-2.0
"""Layers are unpacked here while they are downloaded; containerd does it if that fails."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lazysnap.containerd._pb.types.mount_pb2 import Mount
from lazysnap.containerd.client import Containerd
from lazysnap.digest import Digest
from lazysnap.oci import OCI_LAYER_GZIP, Descriptor
from lazysnap.pull.local_unpack import job_for
from lazysnap.pull.puller import pull
from lazysnap.registry import Registry
from lazysnap.unpack.applier_pool import ApplierPool
from tests.pull.conftest import AMD64, serve
from tests.support import images, layers, tree
from tests.support.containerd import PrivateContainerd
from tests.support.registry import FaultyRegistry
from tests.support.views import make_view
from tests.unpack.stacked import HIGH, LOW

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture
def layout(tmp_path: Path) -> images.Layout:
    return images.write_layout(tmp_path / "layout", images.busybox_layers(os.urandom(3 << 20)))


def _applied(daemon: PrivateContainerd) -> int:
    """How many layers the diff service has unpacked."""
    return daemon.log().count("diff applied")


def _tree(
    daemon: PrivateContainerd, chain_id: str, target: Path, namespace: str
) -> dict[bytes, dict[str, str]]:
    snapshots = ("snapshots", "--snapshotter", "overlayfs")
    target.mkdir()
    key = f"view-{os.urandom(4).hex()}"
    make_view(daemon.address, "overlayfs", key, chain_id, namespace=namespace)
    mount = daemon.ctr(*snapshots, "mounts", str(target), key, namespace=namespace)
    assert os.system(shlex.join(shlex.split(mount))) == 0
    try:
        return tree.read_tree(str(target))
    finally:
        assert os.system(f"umount {target}") == 0


@pytest.fixture
def appliers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command that every applier is started by; may be changed."""
    command: list[str] = []

    class Changed(ApplierPool):
        def __init__(self, limit: int) -> None:
            super().__init__(limit)
            if command:
                self.command = command

    monkeypatch.setattr("lazysnap.pull.unpack.ApplierPool", Changed)
    yield command


async def test_the_tree_is_containerds(
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
    layout: images.Layout,
    tmp_path: Path,
) -> None:
    reference = serve(server, layout)
    registry.allow_plain_http(reference.host)
    await pull(reference, client, registry, "overlayfs", AMD64)
    assert _applied(daemon) == 0
    command = ("images", "pull", "--plain-http", reference.name)
    await trio.to_thread.run_sync(lambda: daemon.ctr(*command, namespace="other"))
    assert _applied(daemon) == 3
    found = [
        await trio.to_thread.run_sync(
            _tree, daemon, layout.chain_ids[-1], tmp_path / namespace, namespace
        )
        for namespace in ("default", "other")
    ]
    for each in found:
        del each[b"."]  # made with the snapshot
    assert tree.differences(*found) == [], tree.report(tree.differences(*found))
    kinds = {kind for _, kind in daemon.snapshots("overlayfs").values()}
    assert kinds == {"Committed", "View"}  # none that was only unpacked in


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "head -c 100000 >/dev/null; exit 0",
        "cat >/dev/null; printf '\\0\\0\\0\\1x'",
        # leaves something behind: the snapshot is thrown away
        """python3 -c 'import sys,re;d=sys.stdin.buffer.read(500)
t=re.search(rb"target.(/[^\\xa4\\xa5\\xa6]*/fs)",d)
open(t[1].decode()+"/left","w");sys.exit(1)'""",
    ],
)
async def test_what_fails_here_is_done_by_containerd(
    script: str,
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
    layout: images.Layout,
    appliers: list[str],
    tmp_path: Path,
) -> None:
    appliers[:] = ["sh", "-c", script]
    reference = serve(server, layout)
    registry.allow_plain_http(reference.host)
    await pull(reference, client, registry, "overlayfs", AMD64)
    assert _applied(daemon) == 3
    found = await trio.to_thread.run_sync(
        _tree, daemon, layout.chain_ids[-1], tmp_path / "t", "default"
    )
    assert found[b"data/hello"]["size"] == str(len("hello from the top layer\n"))
    assert b"left" not in found
    kinds = {kind for _, kind in daemon.snapshots("overlayfs").values()}
    assert kinds <= {"Committed", "View"}


_HIGH = HIGH[:3]


@pytest.mark.parametrize("high", [_HIGH[:1], _HIGH[:2], _HIGH[2:], _HIGH])
async def test_what_layers_have_to_do_with_those_below(
    high: list[list[layers.LayerEntry]],
    daemon: PrivateContainerd,
    client: Containerd,
    server: FaultyRegistry,
    registry: Registry,
    tmp_path: Path,
) -> None:
    tars = [layers.make_tar(each) for each in (LOW, *high)]
    made = images.write_layout(tmp_path / "l", [images.gzip_layer(tar) for tar in tars])
    reference = serve(server, made)
    registry.allow_plain_http(reference.host)
    await pull(reference, client, registry, "overlayfs", AMD64)
    assert _applied(daemon) == (1 if high[-1] is _HIGH[2] else 0)
    command = ("images", "pull", "--plain-http", reference.name)
    await trio.to_thread.run_sync(lambda: daemon.ctr(*command, namespace="other"))
    found = [
        await trio.to_thread.run_sync(_tree, daemon, made.chain_ids[-1], tmp_path / name, name)
        for name in ("default", "other")
    ]
    left = [
        each
        for each in tree.differences(*found)
        if (each.path, each.field) != (b".", "mtime")
        and not (each.path in (b"a", b"a/b", b"late") and each.field == "mtime")
    ]
    assert left == [], tree.report(left)
    assert found[0][b"a"]["uid"] == "11"
    if high[0] is _HIGH[0]:
        assert b"gone" not in found[0]


def _blob(media_type: str = OCI_LAYER_GZIP) -> Descriptor:
    return Descriptor(media_type=media_type, digest=Digest.of(b""), size=1)


async def test_only_directories_that_are_ours_to_fill(
    daemon: PrivateContainerd, tmp_path: Path
) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    (full / "x").mkdir(parents=True)
    upper = [f"workdir=/w,upperdir={empty}", "lowerdir=/a:/b"]
    overlay = Mount(type="overlay", options=[*upper[0].split(","), upper[1]])
    bind = Mount(type="bind", source=str(empty), options=["rw", "rbind"])
    job = job_for(_blob(), [overlay], daemon.address)
    assert job is not None
    assert (job.target, job.lowers, job.whiteouts) == (str(empty), ["/a", "/b"], "trusted")
    job = job_for(_blob(), [bind], daemon.address)
    assert job is not None
    assert (job.target, job.whiteouts) == (str(empty), "remove")
    refused = [
        (_blob(OCI_LAYER_GZIP + "+encrypted"), [bind], daemon.address),
        (
            _blob("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            [bind],
            daemon.address,
        ),
        (_blob(), [], daemon.address),
        (_blob(), [bind, bind], daemon.address),
        (_blob(), [Mount(type="bind", source=str(full), options=["rw"])], daemon.address),
        (_blob(), [Mount(type="bind", source=str(empty), options=["ro"])], daemon.address),
        (_blob(), [Mount(type="bind", source="/no/such", options=["rw"])], daemon.address),
        (_blob(), [Mount(type="ext4", source="/dev/x", options=["rw"])], daemon.address),
        (_blob(), [Mount(type="overlay", options=["lowerdir=/a:/b"])], daemon.address),
        (_blob(), [Mount(type="overlay", options=[*overlay.options, "userxattr"])], daemon.address),
        (_blob(), [bind], str(tmp_path / "no.sock")),
    ]
    assert [job_for(*each) for each in refused] == [None] * len(refused)
