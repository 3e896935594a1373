# SPDX-License-Identifier: Apache-2.0
"""The database, and what has to agree with it: directories, slots, mounts."""

from __future__ import annotations

import base64
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap import mounts
from lazysnap.check import mount_points, store, trial
from lazysnap.check.finding import Context, Finding, Level
from lazysnap.check.running import repair
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.layers.slots import remove_slot
from lazysnap.overlay import Kind
from tests.check.scene import Scene, context, look
from tests.support import layers
from tests.support.filesystems import mounted as loop_mounted
from tests.support.indexes import toc_of

PROBES = (*store.PROBES, *mount_points.PROBES)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    it = Scene(tmp_path)
    try:
        yield it
    finally:
        it.store.close()
        mounts.unmount_below(str(tmp_path))


async def _found(scene: Scene, probe: str) -> list[Finding]:
    found = await look(scene.context, PROBES, probe)
    assert all(finding.hint and finding.detail for finding in found)
    return found


async def _repaired(scene: Scene, found: list[Finding]) -> list[str]:
    return [finding.fixed for finding in repair(scene.context, found)]


@pytest.mark.parametrize("probe", [probe.id for probe in PROBES])
async def test_all_agrees(scene: Scene, probe: str) -> None:
    assert await _found(scene, probe) == []


@pytest.mark.parametrize("probe", [probe.id for probe in PROBES])
async def test_without_a_root_nothing_is_said(tmp_path: Path, probe: str) -> None:
    assert await look(context(tmp_path), PROBES, probe) == []


async def test_no_database_yet(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (found,) = await look(context(tmp_path), PROBES, "database")
    assert found.level is Level.INFO
    assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.parametrize("where", ["header", "page"])
async def test_a_damaged_database(scene: Scene, where: str) -> None:
    for number in range(200):
        scene.snapshot(f"snapshot {number} with quite a long name, to have several pages of them")
    scene.store.close()
    path = scene.root / "metadata.db"
    with path.open("r+b") as file:
        file.seek(0 if where == "header" else 3 * 4096)
        file.write(b"\xa5" * 4096)
    (found,) = await _found(scene, "database")
    assert (found.level, "damaged" in found.summary) == (Level.FAILURE, True)
    # what cannot be known is not taken for gone
    for probe in ("snapshots", "slots", "mounts", "unknown-mounts"):
        assert [f for f in await look(scene.context, PROBES, probe) if f.fix] == []


async def test_a_row_without_its_parent(scene: Scene) -> None:
    scene.store.close()
    with sqlite3.connect(scene.root / "metadata.db") as database:
        database.execute("UPDATE snapshots SET parent_id = 999")
    database.close()
    (found,) = await _found(scene, "database")
    assert found.level is Level.FAILURE
    assert "snapshots" in found.summary


async def test_a_database_that_is_in_use_can_be_read(scene: Scene) -> None:
    with scene.store.creating(Kind.ACTIVE, "key"):
        assert await _found(scene, "database") == []


async def test_a_snapshot_without_its_directory(scene: Scene) -> None:
    (scene.root / f"snapshots/{scene.plain}/fs").rmdir()
    (scene.root / f"snapshots/{scene.plain}").rmdir()
    (found,) = await _found(scene, "snapshots")
    assert found.level is Level.FAILURE
    assert str(scene.plain) in found.summary


async def test_directories_of_no_snapshot_are_removed(scene: Scene) -> None:
    for name in ("99", "new-abc", "rm-7-abc"):
        (scene.root / "snapshots" / name / "fs").mkdir(parents=True)
    (scene.root / "snapshots/lost+found").mkdir()
    serving = scene.say_serving()
    assert await _found(scene, "snapshots") == []  # it may be building them
    os.close(serving)
    found = await _found(scene, "snapshots")
    assert [finding.level for finding in found] == [Level.WARNING]
    assert all(await _repaired(scene, found))
    left = {path.name for path in (scene.root / "snapshots").iterdir()}
    assert left == {str(scene.plain), "lost+found"}


async def test_directories_that_a_running_daemon_forgot(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scene.root / "snapshots/99").mkdir()
    serving = scene.say_serving()
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    assert len(await _found(scene, "snapshots")) == 1
    os.close(serving)


async def test_an_index_that_is_not_of_the_blob_of_its_slot(scene: Scene) -> None:
    scene.lazy("lazy")
    path = scene.root / "cache/index/i"
    another = layers.estargz([layers.file("f", b"another")])
    path.write_bytes(encode(build(toc_of(another))))
    (found,) = await _found(scene, "slots")
    assert f"is of a blob of {another.size} bytes" in found.summary
    path.write_bytes(b"")
    (found,) = await _found(scene, "slots")
    assert "is damaged" in found.summary


async def test_slots_and_indexes_that_are_gone(scene: Scene) -> None:
    number = scene.lazy("lazy")
    assert await _found(scene, "slots") == []
    (scene.root / "cache/index/i").unlink()
    (found,) = await _found(scene, "slots")
    assert "index" in found.summary
    slot = scene.store.attachments()[number].slot
    (scene.root / f"slots/{slot}").write_bytes(b"no record")
    (found,) = await _found(scene, "slots")
    assert "damaged" in found.summary
    remove_slot(str(scene.root), slot)
    (found,) = await _found(scene, "slots")
    assert (found.level, "no record" in found.summary) == (Level.FAILURE, True)


async def test_slots_of_no_snapshot(scene: Scene) -> None:
    scene.lazy("lazy")
    scene.store.remove("lazy")
    (found,) = await _found(scene, "slots")
    assert found.level is Level.WARNING


@pytest.mark.root
async def test_a_layer_that_is_not_mounted(scene: Scene) -> None:
    scene.lazy("lazy")
    (found,) = await _found(scene, "mounts")
    assert (found.level, "not mounted" in found.summary) == (Level.FAILURE, True)


@pytest.mark.root
async def test_a_layer_that_is_not_mounted_yet(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = scene.lazy("lazy")
    serving = scene.say_serving()
    monkeypatch.setattr(mount_points, "_SETTLE_SECONDS", 0.1)
    (found,) = await _found(scene, "mounts")
    assert (found.level, "not mounted yet" in found.summary) == (Level.WARNING, True)
    later = time.time() + 200
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: later)
        (found,) = await _found(scene, "mounts")
        assert (found.level, "not mounted:" in found.summary) == (Level.FAILURE, True)

    # It is while the probe waits for it.
    looked = mount_points._lost

    def mount_it(context: Context) -> tuple[list[int], list[int]]:
        lost = looked(context)
        if lost == ([number], []):
            mounts.bind(str(tmp_path), str(scene.root / f"snapshots/{number}/fs"))
            monkeypatch.setattr(mount_points, "shows_layer", lambda *_: True)
        return lost

    monkeypatch.setattr(mount_points, "_SETTLE_SECONDS", 60.0)
    monkeypatch.setattr(mount_points, "_lost", mount_it)
    assert await _found(scene, "mounts") == []
    os.close(serving)


@pytest.mark.root
async def test_a_layer_that_shows_something_else(scene: Scene, tmp_path: Path) -> None:
    number = scene.lazy("lazy")
    mounts.bind(str(tmp_path), str(scene.root / f"snapshots/{number}/fs"))
    (found,) = await _found(scene, "mounts")
    assert (found.level, "is gone" in found.summary) == (Level.FAILURE, True)


@pytest.mark.root
@pytest.mark.parametrize("place", ["cache/trees", "elsewhere"])
async def test_a_tree_that_the_kernel_serves(scene: Scene, place: str) -> None:
    number = scene.lazy("lazy")
    image = scene.root / place / "image"
    image.parent.mkdir(parents=True)
    image.write_bytes(zlib.decompress(base64.b64decode(trial._EROFS)))
    with loop_mounted(image, scene.root / f"snapshots/{number}/fs", "ro"):
        assert len(await _found(scene, "mounts")) == (place == "elsewhere")
        assert await _found(scene, "unknown-mounts") == []


@pytest.mark.root
async def test_mounts_that_nobody_knows(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen").mkdir()
    for name in ("snapshots/99/fs", "shards/odd", "cache/of-the-administrator"):
        (scene.root / name).mkdir(parents=True)
        mounts.bind(str(tmp_path / "seen"), str(scene.root / name))
    serving = scene.say_serving()
    monkeypatch.setattr(mount_points, "_SETTLE_SECONDS", 0.01)
    assert len(await _found(scene, "unknown-mounts")) == 2
    os.close(serving)
    found = await _found(scene, "unknown-mounts")
    assert [finding.level for finding in found] == [Level.WARNING] * 2
    assert all(await _repaired(scene, found))
    left = [point.path for point in mounts.mounted_below(str(scene.root))]
    assert left == [str(scene.root / "cache/of-the-administrator")]
