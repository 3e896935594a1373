# SPDX-License-Identifier: Apache-2.0
"""The mounts that make a snapshot's tree, in the form that containerd passes to mount(2).

Pure: knows the layout of a snapshot's directories, nothing of the database or of the kernel. The
cases are those of containerd's own overlay snapshotter (plugins/snapshots/overlay/overlay.go), so
that clients which look into the options (upperdir=, lowerdir=) find what they expect.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Kind(enum.IntEnum):
    """What a snapshot is; the numbers are those of containerd's API."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount that a client is to make.

    Args:
        type: file system type, or `bind`.
        source: device or directory.
        options: as after `mount -o`.
        target: path below the final mount point; empty for the mount point itself.
    """

    type: str
    source: str
    options: tuple[str, ...]
    target: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What the kernel wants added to each overlay mount.

    Args:
        index_off: the kernel has the `index` feature, which must be off as snapshots share lower
            directories and are mounted again at other places.
        userxattr: overlay runs in a user namespace and may only use `user.overlay.*`.
    """

    index_off: bool = False
    userxattr: bool = False

    def as_mount_options(self) -> tuple[str, ...]:
        """The options as after `mount -o`."""
        return ("index=off",) * self.index_off + ("userxattr",) * self.userxattr


def fs_path(snapshots: str, snapshot_id: int) -> str:
    """The directory with a snapshot's own files, or its mount point if it is lazy.

    Args:
        snapshots: the directory of all snapshots.
        snapshot_id: the snapshot's number.
    """
    return f"{snapshots}/{snapshot_id}/fs"


def work_path(snapshots: str, snapshot_id: int) -> str:
    """The directory that overlay wants beside an upper directory."""
    return f"{snapshots}/{snapshot_id}/work"


def mounts(
    snapshots: str, kind: Kind, snapshot_id: int, lower: Sequence[str], options: Options
) -> tuple[Mount, ...]:
    """The mounts of a view or an active snapshot.

    Args:
        snapshots: the directory of all snapshots.
        kind: `VIEW` or `ACTIVE`.
        snapshot_id: the snapshot's number.
        lower: the directories that show its ancestors, uppermost first.
        options: what the kernel wants.

    Returns:
        One mount; a bind where overlay would refuse (one directory) or be waste.
    """
    fs = fs_path(snapshots, snapshot_id)
    if not lower:
        access = "rw" if kind is Kind.ACTIVE else "ro"
        return (Mount("bind", fs, (access, "rbind")),)
    if kind is not Kind.ACTIVE and len(lower) == 1:
        return (Mount("bind", lower[0], ("ro", "rbind")),)
    upper: tuple[str, ...] = ()
    if kind is Kind.ACTIVE:
        upper = (f"workdir={work_path(snapshots, snapshot_id)}", f"upperdir={fs}")
    below = f"lowerdir={':'.join(lower)}"
    return (Mount("overlay", "overlay", (*options.as_mount_options(), *upper, below)),)
