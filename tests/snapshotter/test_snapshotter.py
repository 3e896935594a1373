# SPDX-License-Identifier: Apache-2.0
"""What containerd's suite does not ask: directories, recovery, housekeeping, the lazy seam."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio

from lazysnap import mounts
from lazysnap.digest import Digest
from lazysnap.errors import (
    AlreadyExists,
    ConfigError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    NotLazy,
    Unavailable,
)
from lazysnap.labels import REASON, REMOTE, SNAPSHOT_REF
from lazysnap.oci import chain_id
from lazysnap.overlay import Kind
from lazysnap.reference import Reference
from lazysnap.snapshotter import Settings, Snapshotter
from lazysnap.snapshotter.interfaces import Attached, Filesystem, LayerBlob, Lower, Unpacker
from lazysnap.store.records import Attachment, Usage
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.unpack.process import Answer

REF = {SNAPSHOT_REF: "sha256:ref", "containerd.io/snapshot/cri.layer-digest": "sha256:layer"}


@asynccontextmanager
async def running(
    root: Path,
    filesystem: Filesystem | None = None,
    settings: Settings | None = None,
    unpacker: Unpacker | None = None,
) -> AsyncIterator[Snapshotter]:
    root.mkdir(exist_ok=True)
    store = SnapshotStore(str(root / "metadata.db"))
    try:
        async with trio.open_nursery() as nursery:
            snapshotter = Snapshotter(
                str(root), store, filesystem=filesystem, settings=settings, unpacker=unpacker
            )
            await snapshotter.start(nursery)
            yield snapshotter
            await snapshotter.aclose()
    finally:
        store.close()


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root / "snapshots"))


async def all_names(snapshotter: Snapshotter) -> list[str]:
    found, after = await snapshotter.list()
    assert after is None
    return [each.name for each in found]


# -- directories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
async def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        async with running(tmp_path / "root") as snapshotter:
            await snapshotter.prepare("key")
            await snapshotter.view("view")
    finally:
        os.umask(before)
    for path, mode in {
        "": 0o700,
        "snapshots": 0o700,
        "snapshots/1": 0o700,
        "snapshots/1/fs": 0o755,
        "snapshots/1/work": 0o711,
        "snapshots/2/fs": 0o755,
    }.items():
        assert (tmp_path / "root" / path).stat().st_mode & 0o7777 == mode, path
    assert not (tmp_path / "root/snapshots/2/work").exists()


@pytest.mark.root
async def test_the_owner_of_the_top_directory_is_inherited(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
        os.chown(tmp_path / "snapshots/1/fs", 123, 456)
        await snapshotter.commit("name", "key")
        await snapshotter.prepare("child", "name")
        await snapshotter.view("view", "name")
    for number in (2, 3):
        status = (tmp_path / f"snapshots/{number}/fs").stat()
        assert (status.st_uid, status.st_gid) == (123, 456)


@pytest.mark.parametrize("name", ["with:colon", "with,comma", "with\\backslash"])
def test_a_root_that_overlay_cannot_name_is_refused(tmp_path: Path, name: str) -> None:
    store = SnapshotStore(str(tmp_path / "db"))
    with pytest.raises(ConfigError, match="overlay"):
        Snapshotter(str(tmp_path / name), store)
    with pytest.raises(ConfigError, match="absolute"):
        Snapshotter("relative", store)
    store.close()


async def test_a_failed_prepare_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
        await snapshotter.commit("base", "key")
        (tmp_path / "snapshots/1/fs").rmdir()
        with pytest.raises(Internal, match="snapshots/1/fs: No such file"):
            await snapshotter.prepare("child", "base")
        await snapshotter.cleanup()
        assert names(tmp_path) == ["1"]
        assert await all_names(snapshotter) == ["base"]


async def test_a_directory_that_is_in_the_way_is_put_aside(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        # as after a rename whose transaction failed, while the garbage is not collected yet
        (tmp_path / "snapshots/1/fs").mkdir(parents=True)
        (tmp_path / "snapshots/1/fs/stale").touch()
        await snapshotter.prepare("key")
        assert os.listdir(tmp_path / "snapshots/1/fs") == []
        await snapshotter.cleanup()
        assert names(tmp_path) == ["1"]


async def test_garbage_is_collected_also_after_a_client_has_asked_for_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with running(root) as snapshotter:
        for _ in range(3):
            await snapshotter.prepare("key")
            await snapshotter.cleanup()
            await snapshotter.remove("key")
            with trio.fail_after(60):
                while names(root):
                    await trio.sleep(0.01)


# -- housekeeping ---------------------------------------------------------------------------------


async def test_what_the_database_does_not_know_is_reclaimed_at_start(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
    for name in ("new-1", "rm-2", "77"):
        (tmp_path / "snapshots" / name / "fs/etc").mkdir(parents=True)
    for name in ("lost+found", "0", "README"):
        (tmp_path / "snapshots" / name).mkdir()
    async with running(tmp_path) as snapshotter:
        await snapshotter.cleanup()
        assert names(tmp_path) == ["0", "1", "README", "lost+found"]
        assert await all_names(snapshotter) == ["key"]


@pytest.mark.root
async def test_mounts_in_what_is_reclaimed_are_undone_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    root = tmp_path / "root"
    (root / "snapshots/5/fs").mkdir(parents=True)
    mounts.bind(str(tmp_path / "kept"), str(root / "snapshots/5/fs"))
    async with running(root) as snapshotter:
        await snapshotter.cleanup()
        assert names(root) == []
    assert (tmp_path / "kept/file").exists()
    assert mounts.mounted_below(str(root)) == []


async def test_removed_snapshots_are_deleted_without_being_asked(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
        await snapshotter.remove("key")
        with trio.fail_after(120):
            while names(tmp_path):
                await trio.sleep(0.01)


async def test_usage_is_that_of_du(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
        (tmp_path / "snapshots/1/fs/file").write_bytes(b"x" * 100_000)
        os.link(tmp_path / "snapshots/1/fs/file", tmp_path / "snapshots/1/fs/other")
        said = await trio.run_process(
            ["du", "-sB1", tmp_path / "snapshots/1/fs"], capture_stdout=True
        )
        expected = Usage(int(said.stdout.split()[0]), 2)
        assert await snapshotter.usage("key") == expected
        await snapshotter.commit("name", "key")
        (tmp_path / "snapshots/1/fs/later").write_bytes(b"x" * 100_000)
        assert await snapshotter.usage("name") == expected, "not what was there at the commit"
        await snapshotter.view("view", "name")
        assert await snapshotter.usage("view") == Usage(0, 0)
        with pytest.raises(NotFound):
            await snapshotter.usage("missing")


async def test_a_commit_does_not_wait_for_a_long_count(tmp_path: Path) -> None:
    async with running(tmp_path, settings=Settings(measure_seconds=0)) as snapshotter:
        await snapshotter.prepare("key")
        (tmp_path / "snapshots/1/fs/file").write_bytes(b"x" * 100_000)
        await snapshotter.commit("name", "key")
        assert (await snapshotter.usage("name")).inodes == 2
        with trio.fail_after(120):
            while (await snapshotter.stat("name")).usage is None:
                await trio.sleep(0.01)
        assert (await snapshotter.stat("name")).usage == await snapshotter.usage("name")


async def test_a_count_that_was_cut_off_is_made_at_the_next_start(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
        await snapshotter.commit("name", "key")
    store = SnapshotStore(str(tmp_path / "metadata.db"))
    store._db.execute("UPDATE snapshots SET size = NULL, inodes = NULL")
    store.close()
    async with running(tmp_path) as snapshotter:
        with trio.fail_after(120):
            while (await snapshotter.stat("name")).usage is None:
                await trio.sleep(0.01)


@pytest.mark.root
async def test_a_failed_sync_fails_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_path: str) -> None:
        raise Internal("I/O error", reason="sync-failed")

    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("key")
        with monkeypatch.context() as patch:
            patch.setattr(mounts, "sync_filesystem", broken)  # the kernel's part
            with pytest.raises(Internal, match="I/O error"):
                await snapshotter.commit("name", "key")
        assert (await snapshotter.stat("key")).kind is Kind.ACTIVE
        await snapshotter.commit("name", "key")


async def test_mounts_of_a_committed_snapshot(tmp_path: Path) -> None:
    async with running(tmp_path) as snapshotter:
        made = await snapshotter.prepare("key")
        assert await snapshotter.mounts("key") == made
        await snapshotter.commit("name", "key")
        with pytest.raises(FailedPrecondition):
            await snapshotter.mounts("name")
        with pytest.raises(NotFound):
            await snapshotter.mounts("key")


async def test_one_of_many_at_once_wins(tmp_path: Path) -> None:
    outcomes: list[str] = []

    async with running(tmp_path) as snapshotter:

        async def prepare() -> None:
            try:
                await snapshotter.prepare("key")
                outcomes.append("made")
            except AlreadyExists:
                outcomes.append("exists")

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(prepare)
        assert sorted(outcomes) == ["exists"] * 19 + ["made"]
        await snapshotter.cleanup()
        assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("checkpoints", range(12))
async def test_a_cancelled_operation_is_done_or_not(tmp_path: Path, checkpoints: int) -> None:
    """Cancelled at one checkpoint after the other."""
    async with running(tmp_path) as snapshotter:
        await snapshotter.prepare("base key")
        await snapshotter.commit("base", "base key")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel_later() -> None:
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cancel_later)
                await snapshotter.prepare("key", "base")
                await snapshotter.commit("name", "key")
        found = set(await all_names(snapshotter))
        assert found in ({"base"}, {"base", "key"}, {"base", "name"})
        await snapshotter.cleanup()
        assert len(names(tmp_path)) == len(found)


# -- lazy layers ----------------------------------------------------------------------------------


class Directory:
    """Lazy layers whose content is a directory, bound where it is wanted."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.fails: Exception | None = None
        self.unhealthy: set[int] = set()
        self.released: list[Attached] = []
        self.restored: list[Attached] = []
        self.checked: list[list[int]] = []
        self.prepared = 0
        self.late = False  # visible only when it is checked
        self.places: list[str] = []

    async def restore(self, attached: Sequence[Attached]) -> None:
        self.restored = list(attached)

    async def mount(
        self,
        slot: int,
        labels: Mapping[str, str],
        mountpoint: str,
        lowers: Sequence[object] = (),
    ) -> Attachment:
        self.prepared += 1
        await trio.lowlevel.checkpoint()
        if self.fails is not None:
            raise self.fails
        if not self.late:
            mounts.bind(str(self.source), mountpoint, read_only=True)
        return Attachment(slot, 0, labels["containerd.io/snapshot/cri.layer-digest"], b"record")

    async def serves(self, attachment: Attachment, labels: Mapping[str, str]) -> bool:
        return attachment.layer_digest == labels["containerd.io/snapshot/cri.layer-digest"]

    def placed(self, attached: Attached) -> None:
        self.places.append(attached.mountpoint)

    async def lowerdirs(self, layers: Sequence[Lower]) -> Sequence[str]:
        return [layer.directory for layer in layers]

    def starting(self, chain: Sequence[Attached]) -> None:
        pass

    async def check(self, chain: Sequence[Attached]) -> None:
        self.checked.append([each.snapshot_id for each in chain])
        for each in chain:
            if self.late and mounts.mounted_at(each.mountpoint) is None:
                mounts.bind(str(self.source), each.mountpoint, read_only=True)
            assert mounts.mounted_at(each.mountpoint) is not None
            if each.attachment.slot in self.unhealthy:
                raise Unavailable(f"slot {each.attachment.slot} cannot serve", reason="dead")

    async def unmount(self, attached: Attached) -> None:
        self.released.append(attached)
        mounts.unmount(attached.mountpoint)


@pytest.fixture
def layer(tmp_path: Path) -> Directory:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/file").write_text("lazy")
    return Directory(tmp_path / "layer")


@pytest.fixture
def root(tmp_path: Path) -> AsyncIterator[Path]:  # type: ignore[misc]  # pytest's own protocol
    yield tmp_path / "root"  # type: ignore[misc]
    mounts.unmount_below(str(tmp_path))


async def prepare_lazily(
    snapshotter: Snapshotter, key: str = "extract-1 sha256:ref", parent: str = ""
) -> str:
    """As containerd does it: the name of the snapshot that its List would find."""
    with pytest.raises(AlreadyExists):
        await snapshotter.prepare(key, parent, REF)
    with pytest.raises(NotFound):
        await snapshotter.stat(key)
    found, _ = await snapshotter.list()
    [name] = [
        each.name
        for each in found
        if each.labels.get(SNAPSHOT_REF) == "sha256:ref" and each.parent == parent
    ]
    return name


class Unpacking:
    """Unpacks layers that are empty; notes what is visible of the layers below each."""

    def __init__(self) -> None:
        self.below: list[list[str]] = []

    async def find(self, labels: Mapping[str, str]) -> LayerBlob:
        return LayerBlob(Reference.parse("registry.test/image:1"), Digest.of(b"upper"), 1)

    async def unpack(
        self, layer: LayerBlob, target: str, lowers: Sequence[str], *, alone: bool = False
    ) -> Answer:
        await trio.lowlevel.checkpoint()
        self.below = [sorted(os.listdir(lower)) for lower in lowers]
        return Answer(diff_id=_DIFF_ID)


_DIFF_ID = str(Digest.of(b"diff"))


@pytest.mark.root
async def test_a_layer_is_unpacked_on_what_is_visible(root: Path, layer: Directory) -> None:
    """It takes over from those below what it leaves out."""
    layer.late = True
    below = Digest.of(b"below")
    unpacker = Unpacking()
    async with running(root, layer, unpacker=cast(Unpacker, unpacker)) as snapshotter:
        digest = "containerd.io/snapshot/cri.layer-digest"
        with pytest.raises(AlreadyExists):
            await snapshotter.prepare("one", "", {SNAPSHOT_REF: str(below), digest: "sha256:a"})
        assert layer.checked == []
        assert layer.places == [str(root / "snapshots/1/fs")]
        (name,) = await all_names(snapshotter)
        layer.fails = NotLazy("plain", reason="no-toc-digest")
        above = str(chain_id(below, Digest.parse(_DIFF_ID)))
        with pytest.raises(AlreadyExists):
            await snapshotter.prepare("two", name, {SNAPSHOT_REF: above, digest: "sha256:b"})
        assert unpacker.below == [["file"]]
        layer.unhealthy = {1}
        unpacker.below = []
        with pytest.raises(Unavailable):
            await snapshotter.prepare(
                "three", name, {SNAPSHOT_REF: above + "0", digest: "sha256:c"}
            )
        assert unpacker.below == []


@pytest.mark.root
async def test_a_lazy_snapshot_is_there_at_once(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:
        name = await prepare_lazily(snapshotter)
        found = await snapshotter.stat(name)
        assert found.kind is Kind.COMMITTED
        assert found.labels == {**REF, REMOTE: "remote snapshot"}
        assert (root / f"snapshots/{found.id}/fs/file").read_text() == "lazy"
        # again, as for a second namespace
        assert await prepare_lazily(snapshotter, "other") == name
        assert layer.prepared == 1
        [mount] = await snapshotter.prepare("container", name)
        assert mount.options[-1] == f"lowerdir={root}/snapshots/{found.id}/fs"
        layer.unhealthy.add(1)
        for operation in (
            snapshotter.prepare("more", name),
            snapshotter.view("view", name),
            snapshotter.mounts("container"),
        ):
            with pytest.raises(Unavailable):
                await operation
        layer.unhealthy.clear()
        with pytest.raises(FailedPrecondition):
            await snapshotter.remove(name)
        await snapshotter.remove("container")
        await snapshotter.remove(name)
        assert [each.attachment.slot for each in layer.released] == [1]
        await snapshotter.cleanup()
        assert names(root) == []
        assert (layer.source / "file").exists()
        assert mounts.mounted_below(str(root)) == []


@pytest.mark.root
async def test_another_layer_with_the_name_does_not_answer(root: Path, layer: Directory) -> None:
    """Its image claims the chain id; also what the client fills then gets no part of it."""
    digest = "containerd.io/snapshot/cri.layer-digest"
    async with running(root, layer) as snapshotter:
        name = await prepare_lazily(snapshotter)
        other = {**REF, digest: "sha256:other"}
        await snapshotter.prepare("extract-2", "", other)
        assert (await snapshotter.stat("extract-2")).labels[REASON] == "name-taken"
        await snapshotter.commit("verified", "extract-2", other)
        assert layer.prepared == 1
        assert not await snapshotter.may_answer(name, other)
        assert await snapshotter.may_answer(name, REF)
        assert await snapshotter.may_answer("verified", REF)


@pytest.mark.root
@pytest.mark.parametrize("error", [Unavailable("away"), ValueError("a mistake")])
async def test_a_layer_that_cannot_be_compared_does_not_answer(
    root: Path, layer: Directory, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serves(attachment: Attachment, labels: Mapping[str, str]) -> bool:
        raise error

    async with running(root, layer) as snapshotter:
        await prepare_lazily(snapshotter)
        monkeypatch.setattr(layer, "serves", serves)
        await snapshotter.prepare("extract-2", "", REF)
        assert (await snapshotter.stat("extract-2")).labels[REASON] == "name-taken"


@pytest.mark.root
async def test_one_chain_id_on_two_parents(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:
        made = set()
        for namespace in ("ns1", "ns2"):
            await snapshotter.prepare(f"{namespace}/1/key")
            await snapshotter.commit(f"{namespace}/2/base", f"{namespace}/1/key")
            made.add(await prepare_lazily(snapshotter, "extract", f"{namespace}/2/base"))
        assert len(made) == 2
        assert layer.prepared == 2


@pytest.mark.root
async def test_many_prepares_of_one_layer_mount_it_once(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:

        async def prepare(key: str) -> None:
            with pytest.raises(AlreadyExists):
                await snapshotter.prepare(key, "", REF)

        async with trio.open_nursery() as nursery:
            for i in range(10):
                nursery.start_soon(prepare, f"key {i}")
        assert layer.prepared == 1
        await snapshotter.cleanup()
        assert names(root) == ["1"]


@pytest.mark.root
@pytest.mark.parametrize(
    ("error", "reason"),
    [(NotLazy("plain gzip", reason="no-toc"), "no-toc"), (ZeroDivisionError(), "internal")],
)
async def test_a_layer_that_cannot_be_lazy(
    root: Path, layer: Directory, error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer.fails = error
    caplog.set_level("INFO")
    async with running(root, layer) as snapshotter:
        [mount] = await snapshotter.prepare("key", "", {**REF, REASON: "a lie"})
        assert mount.options == ("rw", "rbind")
        assert (await snapshotter.stat("key")).labels == {**REF, REASON: reason}
        [record] = [r for r in caplog.records if "remote-snapshot-prepared" in str(r.__dict__)]
        fields = record.__dict__["fields"]
        assert (fields["remote-snapshot-prepared"], fields["reason"]) == ("false", reason)
        # containerd's unpacker commits with the labels of its request
        await snapshotter.commit("name", "key", REF)
        assert (await snapshotter.stat("name")).labels[REASON] == reason
        await snapshotter.cleanup()
        assert len(names(root)) == 1
        assert layer.checked == []


@pytest.mark.root
async def test_a_sick_lazy_snapshot_is_not_offered_again(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:
        await prepare_lazily(snapshotter)
        layer.unhealthy.add(1)
        await snapshotter.prepare("key", "", REF)
        assert (await snapshotter.stat("key")).labels[REASON] == "dead"


@pytest.mark.root
async def test_without_the_reference_labels_are_only_labels(root: Path, layer: Directory) -> None:
    labels = {k: v for k, v in REF.items() if k != SNAPSHOT_REF}
    async with running(root, layer) as snapshotter:
        await snapshotter.prepare("key", "", {**labels, REMOTE: "a lie"})
        await snapshotter.commit("base", "key")
        await snapshotter.view("view", "base", REF)
        assert layer.prepared == 0


@pytest.mark.root
async def test_errors_come_before_any_mount(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:
        await snapshotter.prepare("active")
        for key, parent, error in [
            ("active", "", AlreadyExists),
            ("new", "missing", NotFound),
            ("new", "active", InvalidArgument),
        ]:
            with pytest.raises(error):
                await snapshotter.prepare(key, parent, REF)
        assert layer.prepared == 0


@pytest.mark.root
async def test_a_parent_that_goes_away_meanwhile(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:
        await snapshotter.prepare("key")
        await snapshotter.commit("base", "key")
        original = layer.mount

        async def mount(
            slot: int, labels: Mapping[str, str], mountpoint: str, *lowers: Sequence[object]
        ) -> Attachment:
            await snapshotter.remove("base")
            return await original(slot, labels, mountpoint, *lowers)

        layer.mount = mount  # type: ignore[method-assign]  # a race, made certain
        with pytest.raises(NotFound):
            await snapshotter.prepare("new", "base", REF)
        assert len(layer.released) == 1
        await snapshotter.cleanup()
        assert names(root) == []
        assert mounts.mounted_below(str(root)) == []


@pytest.mark.root
async def test_lazy_snapshots_after_a_restart(root: Path, layer: Directory) -> None:
    async with running(root, layer) as snapshotter:
        name = await prepare_lazily(snapshotter)
    second = Directory(layer.source)
    async with running(root, second) as snapshotter:
        [restored] = second.restored
        assert restored.mountpoint == str(root / "snapshots/1/fs")
        assert restored.attachment == Attachment(1, 0, "sha256:layer", b"record")
        await snapshotter.cleanup()
        assert (root / "snapshots/1/fs/file").exists()
        await snapshotter.prepare("key", name)
        assert second.checked == [[1]]
    async with running(root) as snapshotter:
        with pytest.raises(Unavailable, match="switched off"):
            await snapshotter.mounts("key")
        await snapshotter.remove("key")
        await snapshotter.remove(name)
        await snapshotter.cleanup()
        assert names(root) == []
    assert mounts.mounted_below(str(root)) == []
    assert (layer.source / "file").exists()
