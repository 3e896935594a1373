# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from lazysnap import mounts
from lazysnap.overlay import Kind, Mount, Options, fs_path, work_path
from lazysnap.overlay import mounts as overlay_mounts

S = "/r/snapshots"
INDEX_OFF = Options(index_off=True)


@pytest.mark.parametrize(
    ("kind", "parents", "expected"),
    [
        (Kind.ACTIVE, (), Mount("bind", f"{S}/9/fs", ("rw", "rbind"))),
        (Kind.VIEW, (), Mount("bind", f"{S}/9/fs", ("ro", "rbind"))),
        (Kind.VIEW, (4,), Mount("bind", f"{S}/4/fs", ("ro", "rbind"))),
        (
            Kind.ACTIVE,
            (4,),
            Mount(
                "overlay",
                "overlay",
                (
                    "index=off",
                    f"workdir={S}/9/work",
                    f"upperdir={S}/9/fs",
                    f"lowerdir={S}/4/fs",
                ),
            ),
        ),
        (
            Kind.VIEW,
            (7, 4, 1),
            Mount("overlay", "overlay", ("index=off", f"lowerdir={S}/7/fs:{S}/4/fs:{S}/1/fs")),
        ),
    ],
)
def test_the_mounts_are_those_of_containerds_overlay_snapshotter(
    kind: Kind, parents: tuple[int, ...], expected: Mount
) -> None:
    lower = [fs_path(S, parent) for parent in parents]
    assert overlay_mounts(S, kind, 9, lower, INDEX_OFF) == (expected,)


def test_options_of_the_kernel() -> None:
    assert Options().as_mount_options() == ()
    assert Options(index_off=True, userxattr=True).as_mount_options() == ("index=off", "userxattr")


@pytest.mark.root
def test_the_nearest_parent_is_on_top(tmp_path: Path) -> None:
    snapshots = str(tmp_path)
    for number in (1, 2, 3):
        Path(fs_path(snapshots, number)).mkdir(parents=True)
        Path(work_path(snapshots, number)).mkdir()
    Path(fs_path(snapshots, 1), "file").write_text("bottom")
    Path(fs_path(snapshots, 2), "file").write_text("top")
    facts = mounts.overlay_facts()
    [mount] = overlay_mounts(
        snapshots, Kind.ACTIVE, 3, [fs_path(snapshots, n) for n in (2, 1)], Options(facts.index)
    )
    target = tmp_path / "merged"
    target.mkdir()
    mounts.mount(mount.source, str(target), mount.type, data=",".join(mount.options))
    try:
        assert (target / "file").read_text() == "top"
        (target / "new").touch()
        assert Path(fs_path(snapshots, 3), "new").exists()
    finally:
        mounts.unmount(str(target))
