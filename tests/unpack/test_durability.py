# SPDX-License-Identifier: Apache-2.0
"""What is committed is on the disk: after a power cut at the moment when Commit or Prepare answers.

The disk is a file on a file system that is frozen while it is copied: the copy has what had reached the
disk by then and nothing else. The same without the sync loses files, so these tests can fail.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from lazysnap import mounts
from lazysnap.errors import AlreadyExists, Internal
from lazysnap.filesystem.layer_unpacker import LayerUnpacker
from lazysnap.labels import SNAPSHOT_REF
from lazysnap.overlay import Kind
from lazysnap.reference import Reference
from lazysnap.snapshotter.interfaces import LayerBlob
from lazysnap.snapshotter.snapshotter import Settings, Snapshotter
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.unpack.applier import apply
from lazysnap.unpack.applier_pool import ApplierPool
from lazysnap.unpack.process import Answer, Job
from tests.support import tree
from tests.support.filesystems import make_image, mounted, tmpfs
from tests.support.tar_entries import file, folder, symlink
from tests.unpack.corpus import digest, pack

pytestmark = pytest.mark.root
MIB = 1 << 20
_TRIES = 10


def _layer(number: int) -> bytes:
    entries = [folder("etc"), symlink("link", "etc")]
    entries += [file(f"etc/{number}-{n}", os.urandom(n * 700)) for n in range(60)]
    return pack([*entries, file("large", os.urandom(2 * MIB))])


class _Local(LayerUnpacker):
    """Layers from memory instead of a registry; the label's value tells which."""

    def __init__(self) -> None:
        self._appliers = ApplierPool(1)
        self.tars: dict[str, bytes] = {}

    async def find(self, labels: Mapping[str, str]) -> LayerBlob:
        tar = self.tars[labels[SNAPSHOT_REF]]
        return LayerBlob(Reference.parse("localhost/x:y"), digest(tar), len(tar))

    async def unpack(
        self, layer: LayerBlob, target: str, lowers: Sequence[str], *, alone: bool = False
    ) -> Answer:
        (tar,) = (tar for tar in self.tars.values() if digest(tar) == layer.digest)
        job = Job(target=target, size=len(tar), digest=str(layer.digest), lowers=list(lowers))

        async def once() -> AsyncGenerator[bytes, None]:
            yield tar

        async with aclosing(once()) as pieces:
            return await self._appliers.apply(job, pieces)


@asynccontextmanager
async def _running(root: Path, *, sync: bool) -> AsyncIterator[tuple[Snapshotter, _Local]]:
    root.mkdir(exist_ok=True)
    store = SnapshotStore(str(root / "metadata.db"))
    unpacker = _Local()
    try:
        snapshotter = Snapshotter(
            str(root), store, settings=Settings(sync_on_commit=sync), unpacker=unpacker
        )
        async with trio.open_nursery() as nursery:
            await snapshotter.start(nursery)
            try:
                yield snapshotter, unpacker
            finally:
                await snapshotter.aclose()
                nursery.cancel_scope.cancel()
    finally:
        store.close()


async def _commit(snapshotter: Snapshotter, name: str, parent: str, tar: bytes) -> str:
    """As a client does it; returns the new parent."""
    await snapshotter.prepare(f"active {name}", parent)
    number = (await snapshotter.stat(f"active {name}")).id
    target = os.path.join(_fs(snapshotter), str(number), "fs")
    await trio.to_thread.run_sync(lambda: apply(io.BytesIO(tar), target))
    await snapshotter.commit(name, f"active {name}")
    return name


async def _direct(
    snapshotter: Snapshotter, unpacker: _Local, chain: str, parent: str, tar: bytes
) -> tuple[str, str]:
    """As the daemon does it by itself; returns the new chain id and parent."""
    diff_id = str(digest(tar))
    chain = (
        f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
    )
    unpacker.tars[chain] = tar
    with pytest.raises(AlreadyExists):
        await snapshotter.prepare(f"key {chain}", parent, {SNAPSHOT_REF: chain})
    found, _ = await snapshotter.list()
    (name,) = (each.name for each in found if each.labels.get(SNAPSHOT_REF) == chain)
    return chain, name


def _fs(snapshotter: Snapshotter) -> str:
    return snapshotter._dirs.snapshots


class _Disk:
    """A disk that can be copied as it is at one moment."""

    def __init__(self, outer: Path, image: Path, inner: Path, memory: Path) -> None:
        self._outer = outer
        self._image = image
        self.inner = inner
        self._copy = memory / "copy"

    def cut(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self._outer], check=True)
        try:
            subprocess.run(["cp", "--sparse=always", self._image, self._copy], check=True)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self._outer], check=True)

    def lost(self, place: Path) -> list[str]:
        """What of the committed snapshots that the copy's database knows is not as it should be."""
        done = subprocess.run(["e2fsck", "-p", self._copy], capture_output=True, check=False)
        assert done.returncode in (0, 1), done.stdout
        with mounted(self._copy, place):
            store = SnapshotStore(str(place / "root/metadata.db"))
            try:
                lines = []
                committed = 0
                for snapshot in store.page()[0]:
                    if snapshot.kind is not Kind.COMMITTED:
                        continue
                    committed += 1
                    below = Path("root/snapshots") / str(snapshot.id) / "fs"
                    before = tree.read_tree(str(self.inner / below))
                    after = tree.read_tree(str(place / below)) if (place / below).is_dir() else {}
                    lines += [str(each) for each in tree.differences(before, after)]
            finally:
                store.close()
        assert committed > 0
        return lines


@contextmanager
def _disk(tmp_path: Path) -> Iterator[_Disk]:
    # In memory: syncs are quick there, and nobody else's writes are waited for.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        outer = Path(memory, "outer")
        make_image(outer, "ext4", 400 * MIB, "-O", "^has_journal")
        with mounted(outer, tmp_path / "outer"):
            image = tmp_path / "outer" / "disk"
            make_image(image, "ext4", 200 * MIB)
            with mounted(image, tmp_path / "inner"):
                yield _Disk(tmp_path / "outer", image, tmp_path / "inner", Path(memory))


@pytest.mark.parametrize("way", ["commit", "direct"])
async def test_what_is_committed_survives_a_power_cut(way: str, tmp_path: Path) -> None:
    with _disk(tmp_path) as disk:
        async with _running(disk.inner / "root", sync=True) as (snapshotter, unpacker):
            chain = parent = ""
            for number in range(4):
                tar = _layer(number)
                if way == "commit":
                    parent = await _commit(snapshotter, f"layer {number}", parent, tar)
                else:
                    chain, parent = await _direct(snapshotter, unpacker, chain, parent, tar)
                disk.cut()
                assert disk.lost(tmp_path / f"cut{number}") == []


@pytest.mark.parametrize("way", ["commit", "direct"])
async def test_without_the_sync_files_are_lost(way: str, tmp_path: Path) -> None:
    with _disk(tmp_path) as disk:
        async with _running(disk.inner / "root", sync=False) as (snapshotter, unpacker):
            chain = parent = ""
            # The kernel may write by itself what was not synced, but not each time.
            for number in range(_TRIES):
                tar = _layer(number)
                if way == "commit":
                    parent = await _commit(snapshotter, f"layer {number}", parent, tar)
                else:
                    chain, parent = await _direct(snapshotter, unpacker, chain, parent, tar)
                disk.cut()
                if disk.lost(tmp_path / f"cut{number}"):
                    return
    pytest.fail("nothing was ever lost: the test above proves nothing")


async def test_a_failed_sync_fails_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = _layer(1)
    real = mounts.sync_filesystem

    def fail(path: str) -> None:
        raise Internal(f"cannot write the file system of {path} to disk", reason="sync-failed")

    async with _running(tmp_path / "root", sync=True) as (snapshotter, unpacker):
        monkeypatch.setattr(mounts, "sync_filesystem", fail)
        with pytest.raises(Internal) as caught:
            await _commit(snapshotter, "layer", "", tar)
        assert caught.value.reason == "sync-failed"
        assert (await snapshotter.stat("active layer")).kind is Kind.ACTIVE
        # one that the daemon unpacks itself becomes an ordinary one, for the client to fill
        unpacker.tars[str(digest(tar))] = tar
        await snapshotter.prepare("direct", "", {SNAPSHOT_REF: str(digest(tar))})
        assert (await snapshotter.stat("direct")).kind is Kind.ACTIVE
        monkeypatch.setattr(mounts, "sync_filesystem", real)
        await snapshotter.commit("layer", "active layer")


async def test_a_disk_that_fails_fails_the_commit(tmp_path: Path) -> None:
    """The disk is a sparse file, for whose blocks there is no room: writing them back fails."""
    with tmpfs(tmp_path / "memory", "size=24m") as memory:
        image = memory / "disk"
        make_image(image, "ext4", 200 * MIB, "-O", "^has_journal", "-E", "lazy_itable_init=1")
        with mounted(image, tmp_path / "inner"):
            root = tmp_path / "inner/root"
            root.mkdir()
            mounts.sync_filesystem(str(root))
            (root / "data").write_bytes(os.urandom(60 * MIB))
            with pytest.raises(Internal) as caught:
                mounts.sync_filesystem(str(root))
            assert caught.value.reason == "sync-failed"
