# SPDX-License-Identifier: Apache-2.0
"""Kernel, FUSE, overlay, EROFS: with real devices, mounts and file systems."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from lazysnap import mounts
from lazysnap.check import kernel, overlay, trial
from lazysnap.check.finding import Level
from tests.check.scene import context, look
from tests.support.filesystems import mounted, tmpfs

pytestmark = pytest.mark.root


async def _levels(directory: Path, probe: str, **changes: str) -> list[Level]:
    probes = (*kernel.PROBES, *overlay.PROBES)
    found = await look(context(directory, **changes), probes, probe)
    assert all(finding.hint or finding.level is Level.INFO for finding in found)
    return [finding.level for finding in found]


@pytest.mark.fuse
async def test_this_machine_has_fuse(tmp_path: Path) -> None:
    assert await _levels(tmp_path, "user") == []
    assert await _levels(tmp_path, "fuse-device") == []


@pytest.mark.parametrize("kind", ["absent", "file", "another device"])
async def test_a_machine_without_fuse(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dev").mkdir()
    device = tmp_path / "dev/fuse"
    if kind == "file":
        device.touch()
    elif kind == "another device":
        os.mknod(device, 0o20600, os.makedev(250, 77))  # no driver has it
    assert await _levels(tmp_path, "fuse-device", system=str(tmp_path)) == [Level.FAILURE]


async def test_without_root_much_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert await _levels(tmp_path, "user") == [Level.WARNING]


@pytest.mark.parametrize(
    ("release", "levels"),
    [
        ("6.9.0", []),
        ("6.18.44-fc", []),
        ("10.0", []),
        ("6.8.12-1-pve", [Level.WARNING]),
        ("5.15.0-generic", [Level.WARNING]),
        ("odd", [Level.INFO]),
    ],
)
async def test_releases(tmp_path: Path, release: str, levels: list[Level]) -> None:
    assert await _levels(tmp_path, "kernel-release", release=release) == levels


async def test_small_requests(tmp_path: Path) -> None:
    assert await _levels(tmp_path, "fuse-limits", system=str(tmp_path)) == []
    limit = tmp_path / "proc/sys/fs/fuse/max_pages_limit"
    limit.parent.mkdir(parents=True)
    limit.write_text("256\n")
    assert await _levels(tmp_path, "fuse-limits", system=str(tmp_path)) == []
    limit.write_text("32\n")
    assert await _levels(tmp_path, "fuse-limits", system=str(tmp_path)) == [Level.WARNING]


async def test_overlay_works_on_this_file_system_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    assert await _levels(tmp_path, "overlay") == []
    assert await _levels(tmp_path, "overlay-opaque") == []
    assert list((tmp_path / "r").iterdir()) == []
    assert mounts.mounted_below(str(tmp_path)) == []


async def test_overlay_does_not_work_on_overlay(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "r"):
        (tmp_path / name).mkdir()
    data = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounts.mount("overlay", str(tmp_path / "r"), "overlay", data=data)
    try:
        assert await _levels(tmp_path, "overlay") == [Level.FAILURE]
        assert list((tmp_path / "r").iterdir()) == []
    finally:
        mounts.unmount(str(tmp_path / "r"))


def test_a_mark_that_spreads_is_seen(tmp_path: Path) -> None:
    """Without `userxattr`, overlay copies `user.` attributes like any others."""
    try:
        assert trial.opaque_spreads(str(tmp_path), "user.overlay.opaque")
    finally:
        mounts.unmount_below(str(tmp_path))


async def test_a_kernel_that_spreads_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tried(*_: object) -> str:
        return "yes"

    monkeypatch.setattr(overlay, "tried", tried)
    assert await _levels(tmp_path, "overlay-opaque") == [Level.WARNING]


async def test_erofs_images_cannot_be_mounted_from_everywhere(tmp_path: Path) -> None:
    """EROFS reads an image through its file's page cache, which tmpfs does not offer."""
    with tmpfs(tmp_path / "r", "size=4m"):
        assert await _levels(tmp_path, "erofs-file") == [Level.INFO]


@pytest.mark.parametrize("probe", ["erofs-file", "overlay-data-only", "kernel-trees"])
async def test_what_only_new_kernels_can_is_no_trouble_without(tmp_path: Path, probe: str) -> None:
    assert await _levels(tmp_path, probe) in ([], [Level.INFO])


def test_the_image_for_the_trial_is_one(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(zlib.decompress(base64.b64decode(trial._EROFS)))
    with mounted(image, tmp_path / "m", "ro"):
        assert (tmp_path / "m/file").read_bytes() == trial._CONTENT


async def test_the_index_parameter(tmp_path: Path) -> None:
    parameter = tmp_path / "sys/module/overlay/parameters/index"
    parameter.parent.mkdir(parents=True)
    for value, levels in (("N\n", []), ("Y\n", [Level.INFO])):
        parameter.write_text(value)
        assert await _levels(tmp_path, "overlay-options", system=str(tmp_path)) == levels


def test_a_user_namespace_is_noticed() -> None:
    code = (
        "from lazysnap.check import overlay\n"
        "from lazysnap.check.finding import Context\n"
        "c = Context(root='/', address='', containerd='')\n"
        "print([f.level.value for f in overlay.options(c)])"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "warning" in done.stdout, done.stderr
