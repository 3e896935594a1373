# SPDX-License-Identifier: Apache-2.0
"""The root directory, its file system, and what dead processes left there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from functools import partial

from lazysnap import mounts
from lazysnap.cache import Cache
from lazysnap.cache.pruning import leftovers
from lazysnap.check.finding import Context, Finding, Fix, Probe, failure, warning
from lazysnap.check.state import SCRATCH, running_daemon

_LEAST_BYTES = 64 << 20
_INODE_SHARE = 100
_MEGABYTE = 1_000_000
_SHOWN = 3
# `.new-<pid>-...` are files in the making (`lazysnap.atomic_files`), `<n>.sock.<pid>` control sockets.
_OF_PROCESS = re.compile(r".+\.new-(\d+)-.+|\d+\.sock\.(\d+)|" + SCRATCH + r"(\d+)-.+", re.ASCII)


def root(context: Context) -> Iterator[Finding]:
    """Whether the root can be used for overlay mounts, and only by root."""
    try:
        status = os.stat(context.root)
    except FileNotFoundError:
        yield warning(
            f"there is no {context.root}",
            "lazysnap serve has never run with this root",
            "start lazysnap serve, or name its directory with --root",
        )
        return
    if not stat.S_ISDIR(status.st_mode):
        yield failure(f"{context.root} is not a directory", hint="name lazysnap's root with --root")
        return
    if any(c in context.root for c in ":,\\\n"):
        yield failure(
            f"the path {context.root!r} has a character that overlay's options cannot contain",
            "no container can be mounted",
            "use a root without colon, comma, backslash and line feed",
        )
    snapshots = context.paths.snapshots
    with contextlib.suppress(FileNotFoundError):
        if os.stat(snapshots).st_mode & 0o077:
            yield warning(
                f"other users can enter {snapshots}",
                "they could run setuid programs of images",
                f"chmod 0700 {snapshots}",
            )
    if not mounts.supports_d_type(context.root):
        yield failure(
            f"the file system of {context.root} does not tell the type of directory entries",
            "overlay shows deleted files then",
            "on XFS, make the file system with ftype=1",
        )


def space(context: Context) -> Iterator[Finding]:
    """Free bytes and inodes of the root's and the cache's file system."""
    seen = set()
    for path in (context.root, context.paths.cache.path):
        try:
            device, status = os.stat(path).st_dev, os.statvfs(path)
        except FileNotFoundError:
            continue
        if device not in seen:
            seen.add(device)
            yield from judge_space(context, path, status)


def judge_space(context: Context, path: str, status: os.statvfs_result) -> Iterator[Finding]:
    """What the numbers of a file system mean."""
    free, reserve = status.f_bavail * status.f_frsize, context.cache.reserve(status)
    numbers = f"{free // _MEGABYTE} MB free at {path}"
    if free < _LEAST_BYTES:
        yield failure(
            f"the disk is full: {numbers}",
            "no layer can be unpacked and no snapshot made",
            "free some space, or run `lazysnap cache prune`",
        )
    elif free < reserve:
        yield warning(
            f"the disk is nearly full: {numbers}, less than the reserve of {reserve // _MEGABYTE} MB",
            "what is fetched is not kept, so it is fetched again and again",
            "free some space, or lower cache.reserve_bytes and cache.reserve_percent",
        )
    if status.f_files and status.f_favail < status.f_files // _INODE_SHARE:
        yield warning(
            f"{status.f_favail} of {status.f_files} inodes are free at {path}",
            "soon no file can be created, although there is space",
            "remove files, or run `lazysnap cache prune`",
        )


def left(context: Context) -> Iterator[Finding]:
    """Files that were being written when their process ended."""
    paths = context.paths
    written = (context.root, paths.profiles, paths.shards, paths.slots, paths.names)
    dead = [path for directory in written for path in _of_dead(directory)]
    dead += _in_cache(context)
    if dead:
        yield _left(dead, "they take space; the processes that were writing them have ended", False)
    # So older releases call them. Only the daemon writes slots, and a record may be in the making.
    slots = paths.slots
    unfinished = [os.path.join(slots, name) for name in _listed(slots) if name.endswith(".new")]
    if unfinished and running_daemon(context) is None:
        yield _left(unfinished, "they are unfinished records of layers, which nobody reads", True)


def _left(paths: Sequence[str], why: str, offline: bool) -> Finding:
    shown = ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
    return warning(
        f"{len(paths)} files are left over: {shown}",
        why,
        "run `lazysnap check --fix`, which removes them",
        Fix(partial(_remove, paths), offline),
    )


def _remove(paths: Sequence[str]) -> str:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    return f"removed {len(paths)} files"


def _in_cache(context: Context) -> list[str]:
    """What is unfinished in the cache, and older than anything takes to be written."""
    directory = context.paths.cache
    if not os.path.isdir(directory.objects):
        return []  # else it would be made
    cache = Cache(directory.path)
    try:
        # An index without a layer may be used again: that goes only by `lazysnap cache prune`.
        indexes = [name for name in os.listdir(cache.index) if ".new-" not in name]
        return [os.path.join(cache.root, found.name) for found in leftovers(cache, indexes)]
    finally:
        cache.objects.close()


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _of_dead(directory: str) -> Iterator[str]:
    for name in _listed(directory):
        match = _OF_PROCESS.fullmatch(name)
        if match is not None and not os.path.exists(f"/proc/{match[match.lastindex or 0]}"):
            yield os.path.join(directory, name)


PROBES = (
    Probe("root", "the root directory can be used", root),
    Probe("space", "there is room on the disk", space),
    Probe("leftovers", "nothing is left over of dead processes", left),
)
