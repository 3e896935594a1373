# SPDX-License-Identifier: Apache-2.0
"""Small file systems for tests, which can be filled, cut off from the disk, or made read-only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def tmpfs(mountpoint: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `mountpoint`, which is created, with these mount options."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", options, "none", mountpoint)
    try:
        yield mountpoint
    finally:
        _run("umount", "--lazy", mountpoint)


def make_image(image: Path, kind: str, size: int, *options: str) -> None:
    """Write an empty file system into a file.

    Args:
        image: the file.
        kind: ext4 or xfs.
        size: in bytes.
        options: of mkfs.
    """
    with image.open("wb") as file:
        file.truncate(size)
    quiet = ("-q", "-F") if kind == "ext4" else ("-q", "-f")
    _run(f"mkfs.{kind}", *quiet, *options, image)


@contextlib.contextmanager
def mounted(image: Path, mountpoint: Path, options: str = "") -> Iterator[str]:
    """Mount a file system that is in a file.

    Args:
        image: the file.
        mountpoint: created when missing.
        options: of mount.

    Yields:
        The loop device, e.g. `/dev/loop0`.
    """
    mountpoint.mkdir(parents=True, exist_ok=True)
    device = _run("losetup", "--find", "--show", image).strip()
    try:
        _run("mount", "-o", options or "rw", device, mountpoint)
        try:
            yield device
        finally:
            _run("umount", "--lazy", mountpoint)
    finally:
        # With --lazy, so that a mount which is still held lets go of it later.
        _run("losetup", "--detach", device)
