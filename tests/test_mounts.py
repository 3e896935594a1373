# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazysnap import mounts
from lazysnap.errors import Internal

root = pytest.mark.root


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory whose name needs all of the kernel's escapes."""
    path = tmp_path / "a b\tc\nd\\e\\040é"
    path.mkdir()
    yield path
    mounts.unmount_below(str(tmp_path))
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@root
def test_bind_is_seen_and_undone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    mounts.bind(str(tmp_path / "source"), str(place))
    assert (place / "file").read_text() == "x"
    found = mounts.mounted_at(str(place))
    assert found is not None
    assert found.root.endswith("/source")
    (place / "file").write_text("y")
    assert mounts.unmount(str(place))
    assert mounts.mounted_at(str(place)) is None
    assert not mounts.unmount(str(place))


@root
def test_a_read_only_bind_refuses_writing(place: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    mounts.bind(str(tmp_path / "source"), str(place), read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        (place / "file").touch()
    (tmp_path / "source" / "file").touch()


@root
def test_everything_below_is_unmounted_topmost_first(place: Path, tmp_path: Path) -> None:
    mounts.mount("one", str(place), "tmpfs")
    (place / "inner").mkdir()
    mounts.mount("two", str(place / "inner"), "tmpfs")
    mounts.mount("three", str(place), "tmpfs")  # hides both
    sibling = tmp_path / (place.name + "x")
    sibling.mkdir()
    mounts.mount("four", str(sibling), "tmpfs")
    assert [point.source for point in mounts.mounted_below(str(place))] == ["three", "two", "one"]
    assert mounts.mounted_at(str(place)).source == "three"  # type: ignore[union-attr]  # is there
    assert mounts.unmount_below(str(place)) == 3
    assert mounts.mounted_at(str(sibling)) is not None


@root
def test_a_mount_in_use_is_detached(place: Path) -> None:
    mounts.mount("busy", str(place), "tmpfs")
    (place / "file").write_text("still readable")
    with (place / "file").open() as file:
        with pytest.raises(Internal, match="busy"):
            mounts.unmount(str(place), lazy=False)
        assert mounts.unmount(str(place))
        assert file.read() == "still readable"


@root
def test_a_symbolic_link_is_not_followed(place: Path, tmp_path: Path) -> None:
    mounts.mount("kept", str(place), "tmpfs")
    (tmp_path / "link").symlink_to(place)
    assert not mounts.unmount(str(tmp_path / "link"))
    assert mounts.mounted_at(str(place)) is not None


@root
def test_a_refused_mount_says_what_and_why(tmp_path: Path) -> None:
    with pytest.raises(Internal, match=f"{tmp_path}/missing: No such file") as caught:
        mounts.bind(str(tmp_path), f"{tmp_path}/missing")
    assert caught.value.reason == "mount-failed"


def test_the_list_agrees_with_findmnt() -> None:
    listed = json.loads(subprocess.check_output(["findmnt", "--json", "--list", "-o", "ID,TARGET"]))
    theirs = {(each["id"], each["target"]) for each in listed["filesystems"]}
    assert {(point.mount_id, point.path) for point in mounts.mount_points()} >= theirs - {
        # another test of the machine may have unmounted it since
        each
        for each in theirs
        if "/pytest" in each[1] or "/tmp/" in each[1]
    }


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_lines_can_be_parsed(lines: list[bytes]) -> None:
    list(mounts.parse_mountinfo(lines))


@given(st.binary(max_size=20))
def test_any_escapes_can_be_parsed(path: bytes) -> None:
    line = b"1 2 0:1 / " + path.replace(b" ", b"") + b" rw - tmpfs none rw"
    list(mounts.parse_mountinfo([line]))


def test_optional_fields_and_subtypes() -> None:
    line = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - fuse.x src rw,errors=continue"
    [point] = mounts.parse_mountinfo([line])
    assert point == mounts.MountPoint(
        36, 35, "98:0", "/mnt1", "/mnt2", "rw,noatime", "fuse.x", "src", "rw,errors=continue"
    )


def test_d_type(tmp_path: Path) -> None:
    assert mounts.supports_d_type(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Internal, match="No such file"):
        mounts.supports_d_type(str(tmp_path / "missing"))


def test_overlay_facts() -> None:
    facts = mounts.overlay_facts()
    assert facts.supported
    assert facts.index == os.path.exists("/sys/module/overlay/parameters/index")
    inside = subprocess.check_output(
        ["unshare", "-Ur", "python3", "-c", "print(open('/proc/self/uid_map').read().split()[1:])"],
        text=True,
    )
    assert facts.user_namespace == ("4294967295" not in Path("/proc/self/uid_map").read_text())
    assert "4294967295" not in inside


def test_sync_filesystem(tmp_path: Path) -> None:
    mounts.sync_filesystem(str(tmp_path))
    with pytest.raises(Internal, match="to disk: No such file"):
        mounts.sync_filesystem(str(tmp_path / "missing"))
