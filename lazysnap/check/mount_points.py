# SPDX-License-Identifier: Apache-2.0
"""The mounts below the root: those that must be there, and those that nobody knows.

Only the kernel's list is read: looking at a mount point would ask its server, which may hang.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial

from lazysnap import mounts
from lazysnap.check.finding import Context, Finding, Fix, Probe, failure, warning
from lazysnap.check.state import running_daemon
from lazysnap.check.store import attached
from lazysnap.mounts import MountPoint
from lazysnap.overlay import fs_path

_SETTLE_SECONDS = 3.0
# Longer than the image of a tree may take.
_NEW_SECONDS = 150.0


def expected(context: Context) -> Iterator[Finding]:
    """Every lazy snapshot shows its layer, through the shard that serves it now."""
    missing, stale = _lost(context)
    up = running_daemon(context) is not None
    cure = "pull or start the image again, which mounts it" if up else "start lazysnap serve"
    if up:
        # A layer can become visible a little later than the database knows it.
        end = time.monotonic() + _SETTLE_SECONDS
        while missing and time.monotonic() < end:
            time.sleep(_SETTLE_SECONDS / 30)
            missing, stale = _lost(context)
        coming = [number for number in missing if _is_new(context, number)]
        missing = [number for number in missing if number not in coming]
        if coming:
            yield warning(
                f"{len(coming)} lazy layers are not mounted yet: snapshots {_some(coming)}",
                "they are large and were pulled just now; a container on them starts when they are mounted",
                "check again in two minutes",
            )
    if missing:
        yield failure(
            f"{len(missing)} lazy layers are not mounted: snapshots {_some(missing)}",
            "containers of their images cannot be started, or see empty directories",
            cure,
        )
    if stale:
        yield failure(
            f"{len(stale)} lazy layers are mounted from a shard that is gone:"
            f" snapshots {_some(stale)}",
            "containers that use them get errors (transport endpoint is not connected)",
            f"{cure}; containers that run now must be started anew",
        )


def _lost(context: Context) -> tuple[list[int], list[int]]:
    """The lazy snapshots that are not mounted, and those mounted from a shard that is gone."""
    known = attached(context) or {}
    points = {point.path: point for point in mounts.mount_points()}
    missing, stale = [], []
    for number, attachment in sorted(known.items()):
        there = points.get(fs_path(context.paths.snapshots, number))
        shard = points.get(context.paths.shard(attachment.shard))
        if there is None:
            missing.append(number)
        elif not shows_layer(context, there, shard, attachment.slot):
            stale.append(number)
    # What was removed meanwhile is no loss.
    now = attached(context) or {}
    return [n for n in missing if n in now], [n for n in stale if n in now]


def _is_new(context: Context, number: int) -> bool:
    """Whether a snapshot got its place so lately that the image of its tree may still be made."""
    try:
        placed = os.stat(context.paths.snapshot(number)).st_ctime
    except OSError:
        return False
    return time.time() - placed < _NEW_SECONDS


def shows_layer(context: Context, there: MountPoint, shard: MountPoint | None, slot: int) -> bool:
    """Whether a mount shows a layer: a slot of its shard's mount, or an image of its tree.

    Args:
        context: what is checked.
        there: what is mounted where the snapshot's files are expected.
        shard: what is mounted where the layer's shard is.
        slot: of the layer.
    """
    if there.fstype == "erofs":
        return _backing(there).startswith(context.paths.cache.trees + "/")
    return shard is not None and there.device == shard.device and there.root == f"/{slot}"


def _backing(point: MountPoint) -> str:
    """The file of an image that is mounted, directly or through a loop device."""
    if not point.source.startswith("/dev/loop"):
        return point.source
    try:
        with open(f"/sys/dev/block/{point.device}/loop/backing_file") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def unknown(context: Context) -> Iterator[Finding]:
    """Mounts at places where the database has none."""
    found = _unknown(context)
    if found and running_daemon(context) is not None:
        # It may be making or removing a snapshot, which takes less than this.
        time.sleep(_SETTLE_SECONDS)
        again = {point.mount_id for point in _unknown(context)}
        found = [point for point in found if point.mount_id in again]
    for point in found:
        yield warning(
            f"the mount at {point.path} ({point.fstype}) belongs to no snapshot",
            "it keeps its shard or its image in use, and its directory cannot be removed",
            "stop lazysnap serve, and run `lazysnap check --fix`, which unmounts it",
            Fix(partial(_unmount, context, point), True),
        )


def _unknown(context: Context) -> list[MountPoint]:
    snapshots, shards = context.paths.snapshots, context.paths.shards
    points = mounts.mount_points()
    known = attached(context)
    if known is None:
        return []  # it cannot be told
    places = {fs_path(snapshots, number) for number in known}
    merged = context.paths.merged
    slots = {context.paths.merged_slot(attachment.slot) for attachment in known.values()}
    return [
        point
        for point in points
        if (point.path.startswith(f"{snapshots}/") and point.path not in places)
        or (point.path.startswith(f"{merged}/") and point.path not in slots)
        or (point.path.startswith(f"{shards}/") and not point.path[len(shards) + 1 :].isdecimal())
    ]


def _unmount(context: Context, point: MountPoint) -> str:
    if point not in _unknown(context):
        return f"nothing to do: {point.path} is not an unknown mount any more"
    mounts.unmount(point.path)
    return f"unmounted {point.path}"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


PROBES = (
    Probe("mounts", "lazy layers are mounted", expected),
    Probe("unknown-mounts", "nothing unknown is mounted", unknown),
)
