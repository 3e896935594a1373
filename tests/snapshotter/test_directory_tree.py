# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import os
import resource
import subprocess
from pathlib import Path

import pytest

from lazysnap import mounts
from lazysnap.errors import Internal
from lazysnap.snapshotter import directory_tree
from lazysnap.store.records import Usage


def du(path: Path) -> Usage:
    """What du(1) says."""
    size = subprocess.check_output(["du", "-s", "-B1", path], text=True).split()[0]
    inodes = subprocess.check_output(["du", "-s", "--inodes", path], text=True).split()[0]
    return Usage(int(size), int(inodes))


def make_tree(top: Path) -> None:
    top.mkdir()
    (top / "sparse").write_bytes(b"x" * 5000)
    os.truncate(top / "sparse", 1 << 30)
    for i in range(50):
        directory = top / f"d{i % 5}" / f"é{i}"
        directory.mkdir(parents=True)
        (directory / "file").write_bytes(b"x" * i * 1000)
        (directory / "link").symlink_to("/")
        os.link(directory / "file", top / f"hard{i}")
        os.mkfifo(directory / "fifo")


def make_deep(top: Path, depth: int, name: str) -> None:
    """A chain of directories that is longer than a path may be."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_measure_agrees_with_du(tmp_path: Path) -> None:
    make_tree(tmp_path / "top")
    assert directory_tree.measure(str(tmp_path / "top")) == du(tmp_path / "top")


def test_remove(tmp_path: Path) -> None:
    make_tree(tmp_path / "top")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tmp_path / "top" / "escape").symlink_to(outside)
    directory_tree.remove(str(tmp_path / "top"))
    assert os.listdir(tmp_path) == ["outside"]
    assert (outside / "kept").exists()
    directory_tree.remove(str(tmp_path / "top"))


def test_a_link_is_no_tree(tmp_path: Path) -> None:
    make_tree(tmp_path / "top")
    (tmp_path / "link").symlink_to("top")
    with pytest.raises(Internal):
        directory_tree.remove(str(tmp_path / "link"))
    with pytest.raises(Internal):
        directory_tree.measure(str(tmp_path / "link"))
    assert (tmp_path / "top" / "sparse").exists()


@pytest.mark.parametrize(("depth", "name"), [(500, "directory0"), (60, "n" * 255), (60, "é" * 127)])
def test_trees_deeper_than_any_path(tmp_path: Path, depth: int, name: str) -> None:
    make_deep(tmp_path / "top", depth, name)
    before = open_files()
    expected = Usage(directory_tree.measure(str(tmp_path / "top")).size, 2 * depth + 1)
    assert directory_tree.measure(str(tmp_path / "top")) == expected
    directory_tree.remove(str(tmp_path / "top"))
    assert not (tmp_path / "top").exists()
    assert open_files() == before


def test_many_entries(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    for i in range(3000):
        (tmp_path / "top" / f"{i}").touch()
    directory_tree.remove(str(tmp_path / "top"))
    assert not (tmp_path / "top").exists()


def test_check_can_stop_it(tmp_path: Path) -> None:
    make_deep(tmp_path / "top", 500, "directory0")
    before = open_files()

    class StoppedError(Exception):
        pass

    for operation in (directory_tree.measure, directory_tree.remove):
        count = iter(range(300))

        def check(count: object = count) -> None:
            if next(count, None) is None:  # type: ignore[call-overload]  # an iterator
                raise StoppedError

        with pytest.raises(StoppedError):
            operation(str(tmp_path / "top"), check)
        assert open_files() == before
    directory_tree.remove(str(tmp_path / "top"))


@pytest.mark.root
def test_nothing_below_a_mount_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "top" / "inner").mkdir(parents=True)
    mounts.mount("none", str(tmp_path / "top" / "inner"), "tmpfs")
    try:
        (tmp_path / "top" / "inner" / "kept").touch()
        with pytest.raises(Internal, match="mounted below"):
            directory_tree.remove(str(tmp_path / "top"))
        assert (tmp_path / "top" / "inner" / "kept").exists()
    finally:
        mounts.unmount_below(str(tmp_path))


def test_running_out_of_files_is_an_error(tmp_path: Path) -> None:
    make_deep(tmp_path / "top", 500, "directory0")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # files that earlier tests have let go of
    before = open_files()
    # The limit is one of numbers, and those that are free below the highest would be used first.
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = [os.dup(0)]
    while taken[-1] < highest:
        taken.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 3, limits[1]))
    try:
        with pytest.raises(Internal, match="Too many open files"):
            directory_tree.measure(str(tmp_path / "top"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    assert open_files() == before
    directory_tree.remove(str(tmp_path / "top"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(Internal, match="No such file"):
        directory_tree.measure(str(tmp_path / "missing"))
