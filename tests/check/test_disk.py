# SPDX-License-Identifier: Apache-2.0
"""The root's file system, the cache on it, and what dead processes leave."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from lazysnap.cache import Cache
from lazysnap.cache.eviction import CacheLimits
from lazysnap.check import cache, disk
from lazysnap.check.disk import judge_space
from lazysnap.check.finding import Finding, Level
from lazysnap.check.running import repair
from tests.check.scene import Scene, context, dead_process, look
from tests.support.filesystems import make_image, mounted, tmpfs

PROBES = (*disk.PROBES, *cache.PROBES)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def _found(scene: Scene, probe: str) -> list[Finding]:
    found = await look(scene.context, PROBES, probe)
    assert all(finding.hint and finding.detail for finding in found)
    return found


@pytest.mark.parametrize("probe", [probe.id for probe in PROBES])
async def test_nothing_is_wrong_with_a_good_root(scene: Scene, probe: str) -> None:
    assert await _found(scene, probe) == []


@pytest.mark.parametrize("probe", [probe.id for probe in PROBES if probe.id != "root"])
async def test_a_root_that_is_not_there_is_told_once(tmp_path: Path, probe: str) -> None:
    assert await look(context(tmp_path), PROBES, probe) == []
    (found,) = await look(context(tmp_path), PROBES, "root")
    assert found.level is Level.WARNING


async def test_roots_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "r").touch()
    (found,) = await look(context(tmp_path), PROBES, "root")
    assert found.level is Level.FAILURE
    (tmp_path / "a:b").mkdir()
    (found,) = await look(context(tmp_path, root=str(tmp_path / "a:b")), PROBES, "root")
    assert (found.level, "colon" in found.hint) == (Level.FAILURE, True)


async def test_other_users_must_not_enter_snapshots(scene: Scene) -> None:
    (scene.root / "snapshots").chmod(0o755)
    (found,) = await _found(scene, "root")
    assert "chmod" in found.hint


@pytest.mark.root
async def test_a_full_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path, "size=16m,nr_inodes=2000"):
        scene = Scene(tmp_path)
        (found,) = await _found(scene, "space")
        assert (found.level, "full" in found.summary) == (Level.FAILURE, True)


@pytest.mark.root
async def test_a_disk_without_inodes(tmp_path: Path) -> None:
    make_image(tmp_path / "image", "ext4", 512 << 20, "-N", "1024")
    with mounted(tmp_path / "image", tmp_path / "m"):
        scene = Scene(tmp_path / "m")
        assert await _found(scene, "space") == []
        status = os.statvfs(scene.root)
        for number in range(status.f_favail - status.f_files // 200):
            (scene.root / f"file{number}").touch()
        (found,) = await _found(scene, "space")
        assert (found.level, "inodes" in found.summary) == (Level.WARNING, True)
        scene.store.close()


def test_the_reserve(tmp_path: Path) -> None:
    def status(free: int) -> os.statvfs_result:
        gigabyte = 1 << 30
        blocks = (100 * gigabyte // 4096, free // 4096, free // 4096)
        return os.statvfs_result((4096, 4096, *blocks, 0, 0, 0, 0, 255))

    ctx = context(tmp_path, cache=CacheLimits(reserve_bytes=1 << 30, reserve_percent=5.0))
    assert list(judge_space(ctx, "/x", status(6 << 30))) == []
    (found,) = judge_space(ctx, "/x", status(4 << 30))
    assert found.level is Level.WARNING
    assert "reserve" in found.summary


async def test_what_dead_processes_left_is_removed(scene: Scene) -> None:
    dead, alive = dead_process(), os.getpid()
    names = (
        f"profiles/{'a' * 64}.json.new-{{}}-1",
        "shards/3.sock.{}",
        "slots/7.new-{}-1",
        "names/7.new-{}-1",
        "check-{}-abc",
    )
    for name in names:
        for pid in (dead, alive):
            path = scene.root / name.format(pid)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"half")
    (scene.root / f"check-{dead}-directory").mkdir()
    (scene.root / f"check-{dead}-directory/file").touch()
    (found,) = await _found(scene, "leftovers")
    assert found.level is Level.WARNING
    assert found.summary.startswith("6 files")
    (after,) = repair(scene.context, [found])
    assert after.fixed
    assert await _found(scene, "leftovers") == []
    assert len(list(scene.root.rglob(f"*{alive}*"))) == 5


async def test_records_that_were_not_finished(scene: Scene) -> None:
    unfinished = scene.root / "slots/7.new"
    unfinished.write_bytes(b"half")
    serving = scene.say_serving()
    assert await _found(scene, "leftovers") == []  # it may be in the making
    os.close(serving)
    (found,) = await _found(scene, "leftovers")
    (after,) = repair(scene.context, [found])
    assert after.fixed
    assert not unfinished.exists()


async def test_what_is_unfinished_in_the_cache(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache(str(scene.root / "cache")).objects.close()
    unfinished = scene.root / "cache/index/x.new-77"
    unfinished.write_bytes(b"half")
    unused = scene.root / "cache/index/of-no-layer"
    unused.write_bytes(b"an index")
    assert await _found(scene, "leftovers") == []  # too young
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    (found,) = await _found(scene, "leftovers")
    assert str(unfinished) in found.summary
    repair(scene.context, [found])
    assert not unfinished.exists()
    assert unused.exists()


def _object(scene: Scene, content: bytes, name: str = "") -> Path:
    name = name or hashlib.sha256(content).hexdigest()
    path = scene.root / f"cache/objects/{name[:2]}/{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


async def test_a_damaged_object_is_found_and_removed(scene: Scene) -> None:
    good = [_object(scene, b"content %d" % number) for number in range(20)]
    assert await _found(scene, "cache-sample") == []
    damaged = _object(scene, b"other bytes", "ab" * 32)
    (found,) = await _found(scene, "cache-sample")
    assert found.level is Level.FAILURE
    assert str(damaged) in found.summary
    (after,) = repair(scene.context, [found])
    assert after.fixed
    assert not damaged.exists()
    assert all(path.exists() for path in good)
    assert await _found(scene, "cache-sample") == []


async def test_only_a_sample_is_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAMPLE", 5)
    for number in range(20):
        _object(scene, b"wrong", f"{number:064x}")
    assert len(await _found(scene, "cache-sample")) == 5


async def test_a_cache_beyond_its_limit(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.context = context(tmp_path, cache=CacheLimits(size_limit_bytes=1_000_000))
    assert await _found(scene, "cache-size") == []
    _object(scene, os.urandom(2_000_000))
    (found,) = await _found(scene, "cache-size")
    assert found.level is Level.WARNING


async def test_layers_that_take_most_of_a_cache(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.context = context(tmp_path, cache=CacheLimits(size_limit_bytes=1_000_000))
    paths = scene.context.paths.cache
    os.makedirs(paths.trees)
    for directory, size in ((paths.indexes, 200_000), (paths.trees, 400_000)):
        assert await _found(scene, "cache-size") == []
        Path(directory, "layer").write_bytes(os.urandom(size))
    (found,) = await _found(scene, "cache-size")
    assert found.level is Level.WARNING
    assert "indexes and trees" in found.summary
