# SPDX-License-Identifier: Apache-2.0
"""The cache's disk is full, out of inodes, read-only or damaged: readers get right bytes all the same.

The registry is there, so "right bytes or an error" always means right bytes here, except for a damaged
index, which cannot be made again by a reader.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import layers
from tests.support.filesystems import make_image, mounted
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]
MIB = 1 << 20
_CONFIG = """
[shards]
count = 1
[fetch]
background = false
learn_profiles = false
[registry]
probe_valid_seconds = 0.0
[cache]
reserve_bytes = 0
reserve_percent = 0.0
"""
_TROUBLE = "serving without it"


class Scene:
    """A stack whose cache is on a disk of its own, and an image that is mounted from it."""

    def __init__(self, it: Stack, disk: Path) -> None:
        self.it = it
        self.disk = disk
        self.tree = it.directory / "view"
        self.digest = ""
        self.pids: dict[int, int] = {}
        self._begun = time.monotonic()

    def mount(self, sizes: list[int], chunk_size: int = 1 << 18, suffix: str = "") -> None:
        rng = random.Random(3)  # data, not a secret
        contents = [rng.randbytes(size) for size in sizes]
        files = [layers.file(f"big/{n:05d}{suffix}", data) for n, data in enumerate(contents)]
        layer = layers.estargz([layers.directory("big"), *files], chunk_size=chunk_size)
        self.it.pull(self.it.push("faults", [layer]))
        (top,) = self.it.containerd.snapshots("lazysnap")
        self.it.mount("view", self.tree, top)
        self.digest = hashlib.sha256(b"".join(contents)).hexdigest()
        self.pids = self.it.lazysnap.workers()

    def read(self) -> str:
        """The digest of all files, none of which comes out of the kernel's cache."""
        total = hashlib.sha256()
        for path in sorted((self.tree / "big").iterdir()):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                while data := os.read(fd, 1 << 17):
                    total.update(data)
            finally:
                os.close(fd)
        return total.hexdigest()

    def restart_worker(self) -> None:
        """Another worker, which knows nothing of what this one has verified."""
        self.it.lazysnap.call(0, "restart")
        wait_until(self._another_worker)

    def _another_worker(self) -> bool:
        with contextlib.suppress(OSError):  # the old one ends while it is asked
            before, self.pids = self.pids, self.it.lazysnap.workers()
            return before != self.pids
        return False

    def fill(self) -> Path:
        """Take all that is left of the disk with a file that is not the cache's."""
        path = self.disk / "other"
        with path.open("wb", buffering=0) as file:
            size = MIB
            while size >= 4096:
                try:
                    file.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    os.fsync(file.fileno())  # gives back what was reserved for the worst case
                    size //= 2
        return path

    def health(self) -> str:
        """The state of the only layer."""
        (slot,) = (int(path.name) for path in (self.it.lazysnap.root / "slots").iterdir())
        state: str = self.it.lazysnap.call(0, "health", slots=[slot])[slot]["state"]
        return state

    def log_lines(self, text: str) -> int:
        return self.it.lazysnap.log().count(text)

    def is_quiet(self, workers: int = 1) -> bool:
        """Whether each worker has complained at most once a minute."""
        minutes = int((time.monotonic() - self._begun) / 60)
        return self.log_lines(_TROUBLE) <= workers * (1 + minutes)

    def all_is_up(self) -> bool:
        return self.it.lazysnap.workers() == self.pids and "Traceback" not in self.it.lazysnap.log()


@contextmanager
def _scene(tmp_path: Path, size: int, *mkfs: str) -> Iterator[Scene]:
    image = tmp_path / "image"
    make_image(image, "ext4", size, "-m", "0", *mkfs)
    with mounted(image, tmp_path / "disk"):
        directory = tmp_path / "s"
        (directory / "r").mkdir(parents=True)
        (tmp_path / "disk" / "cache").mkdir()
        (directory / "r" / "cache").symlink_to(tmp_path / "disk" / "cache")
        with stack(directory, config=_CONFIG) as it:
            yield Scene(it, tmp_path / "disk")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with _scene(tmp_path, 256 * MIB) as scene:
        yield scene


def test_an_image_larger_than_the_disk_is_read_while_the_oldest_goes(tmp_path: Path) -> None:
    with _scene(tmp_path, 24 * MIB) as scene:
        scene.mount([700_000] * 30 + [200_000] * 60)
        assert [scene.read() for _ in range(2)] == [scene.digest] * 2
        assert scene.log_lines("cache evicted") > 0
        assert scene.is_quiet()
        assert scene.all_is_up()


def test_a_disk_that_others_have_filled_does_not_keep_from_reading(scene: Scene) -> None:
    scene.mount([700_000] * 8 + [200_000] * 20)
    other = scene.fill()
    assert [scene.read() for _ in range(2)] == [scene.digest] * 2
    assert scene.log_lines(_TROUBLE) > 0
    assert scene.is_quiet()
    assert scene.all_is_up()
    other.unlink()
    wait_until(lambda: scene.read() == scene.digest and any(scene.disk.glob("cache/*/??/*")))


def test_without_inodes_small_files_are_read(tmp_path: Path) -> None:
    with _scene(tmp_path, 64 * MIB, "-N", "896") as scene:
        scene.mount([1000 + n for n in range(700)])
        assert [scene.read() for _ in range(2)] == [scene.digest] * 2
        assert scene.is_quiet()
        assert scene.all_is_up()


def test_a_disk_that_has_become_read_only_does_not_keep_from_reading(scene: Scene) -> None:
    # Of libraries no neighbours are guessed, so that nothing is stored after what is read here.
    scene.mount([700_000] * 4 + [200_000] * 20, suffix=".so.1")
    names = sorted((scene.tree / "big").iterdir())
    names[0].read_bytes()
    # The last of it may still be open for writing.
    remount = ["mount", "-o", "remount,ro", scene.disk]
    wait_until(lambda: subprocess.run(remount, capture_output=True, check=False).returncode == 0)
    assert [scene.read() for _ in range(2)] == [scene.digest] * 2
    scene.restart_worker()
    assert scene.read() == scene.digest
    assert scene.is_quiet(workers=2)
    assert scene.all_is_up()
    subprocess.run(["mount", "-o", "remount,rw", scene.disk], check=True)


def test_damaged_maps_and_partial_files_are_not_believed(scene: Scene) -> None:
    # Of large libraries nothing is guessed, so that all three stay in parts.
    scene.mount([17 * MIB] * 3, suffix=".so.1")
    for path in sorted((scene.tree / "big").iterdir()):
        with path.open("rb", buffering=0) as file:
            file.read(1000)
    maps = list(scene.disk.glob("cache/partial/*.map"))
    assert len(maps) == 3
    maps[0].write_bytes(b"\1" * 100)
    maps[1].write_bytes(os.urandom(5))
    os.truncate(maps[2].with_suffix(".data"), 7)
    scene.restart_worker()
    assert scene.read() == scene.digest
    assert scene.all_is_up()


def test_a_damaged_index_is_an_error_and_made_anew_at_the_next_use(scene: Scene) -> None:
    scene.mount([200_000] * 2)
    (index,) = (path for path in scene.disk.glob("cache/index/*") if not path.suffix)
    aside = index.with_name("aside")
    aside.write_bytes(b"\0" * index.stat().st_size)
    aside.rename(index)
    scene.restart_worker()
    with pytest.raises(OSError, match="Input/output error"):
        scene.read()
    assert scene.all_is_up()
    (top,) = scene.it.containerd.snapshots("lazysnap").keys() - {"view"}
    scene.it.mount("again", scene.it.directory / "again", top)
    assert scene.read() == scene.digest


def test_a_pruned_cache_breaks_no_reader(scene: Scene) -> None:
    scene.mount([700_000] * 4 + [200_000] * 20)
    assert scene.read() == scene.digest
    assert scene.health() == "local"
    (first, *_) = sorted((scene.tree / "big").iterdir())
    with first.open("rb", buffering=0) as file:
        half = file.read(10_000)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "lazysnap",
                "cache",
                "prune",
                "--all",
                "--root",
                scene.it.lazysnap.root,
            ],
            check=True,
            capture_output=True,
        )
        assert len(half + file.read()) == 700_000
    assert not any(scene.disk.glob("cache/objects/*/*"))
    assert scene.health() == "reachable"
    assert scene.read() == scene.digest
    assert scene.all_is_up()


def test_the_background_does_not_fetch_what_would_only_push_out_other_things(
    tmp_path: Path,
) -> None:
    config = "[cache]\nsize_limit_bytes = 4_000_000\n[fetch]\nbackground_delay_seconds = 0.1\n"
    with stack(tmp_path, config=config) as it:
        files = [layers.file(f"big/{n}", os.urandom(700_000)) for n in range(24)]
        it.pull(it.push("full", [layers.estargz([layers.directory("big"), *files])]))
        wait_until(lambda: "nothing is fetched in the background" in it.lazysnap.log())

        def fetched() -> int:
            return sum(
                layer["fetched_bytes"]
                for shard in it.lazysnap.shards()
                for layer in it.lazysnap.call(shard, "status")
            )

        seen = [fetched()]

        def settled() -> bool:
            time.sleep(1)
            seen.append(fetched())
            return seen[-1] == seen[-2]

        wait_until(settled)  # what was under way has come
        assert seen[-1] < 24 * 700_000
