# SPDX-License-Identifier: Apache-2.0
"""The mounts that make a snapshot's tree, in the form that containerd passes to mount(2).

Pure: knows the layout of a snapshot's directories, nothing of the database or of the kernel. The
cases are those of containerd's own overlay snapshotter (plugins/snapshots/overlay/overlay.go), so
that clients which look into the options (upperdir=, lowerdir=) find what they expect.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Composition:
    """What lazy layers need, and where the bytes of files are if a layer's directory shows no more
    than its tree.

    Such a tree's files are what overlay calls metacopy, and only its option `metacopy` lets it look for
    the bytes of other layers' files than the lowest one's. It also means that changing the owner or mode
    of a file copies none of its bytes. What was written with the option is not readable without it, so
    it is used for all lazy layers, whether the kernel serves their trees at the moment or not.

    Args:
        data: data-only lower directories, in the order in which overlay asks them.
        whole: for each such snapshot a directory that shows the bytes as well, by its number. Used
            where there is nothing to overlay, and where `data` would make the options too long.
        metacopy: the kernel has the option.
    """

    data: tuple[str, ...]
    whole: Mapping[int, str]
    metacopy: bool = True


# mount(2) takes one page of options. containerd leaves 512 bytes of it unused, and beyond that it
# shortens the paths, in a way that does not understand data-only directories.
_OPTIONS_MOST = 4096 - 512


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
    snapshots: str,
    kind: Kind,
    snapshot_id: int,
    parents: Sequence[int],
    options: Options,
    composition: Composition | None = None,
) -> tuple[Mount, ...]:
    """The mounts of a view or an active snapshot.

    Args:
        snapshots: the directory of all snapshots.
        kind: `VIEW` or `ACTIVE`.
        snapshot_id: the snapshot's number.
        parents: the numbers of its ancestors, nearest first, which is overlay's order of lowerdir.
        options: what the kernel wants.
        composition: of the ancestors, if some are lazy.

    Returns:
        One mount; a bind where overlay would refuse (one directory) or be waste.
    """
    fs = fs_path(snapshots, snapshot_id)
    if not parents:
        access = "rw" if kind is Kind.ACTIVE else "ro"
        return (Mount("bind", fs, (access, "rbind")),)
    whole = {} if composition is None else composition.whole
    directories = [whole.get(parent, fs_path(snapshots, parent)) for parent in parents]
    if kind is not Kind.ACTIVE and len(directories) == 1:
        return (Mount("bind", directories[0], ("ro", "rbind")),)
    upper: tuple[str, ...] = ()
    if kind is Kind.ACTIVE:
        upper = (f"workdir={work_path(snapshots, snapshot_id)}", f"upperdir={fs}")
    begin = (*options.as_mount_options(), *upper)
    if composition is not None:
        begin = ("metacopy=on",) * composition.metacopy + begin
        lower = ":".join(fs_path(snapshots, parent) for parent in parents)
        lower = "::".join((lower, *composition.data))
        composed = (*begin, f"lowerdir={lower}")
        if len(",".join(composed).encode()) < _OPTIONS_MOST:
            return (Mount("overlay", "overlay", composed),)
    return (Mount("overlay", "overlay", (*begin, f"lowerdir={':'.join(directories)}")),)
