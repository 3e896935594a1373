# SPDX-License-Identifier: Apache-2.0
"""What tests of `eager = "direct"` share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import tree
from tests.support.stack import Stack
from tests.support.views import make_view

CONFIG = '[snapshots]\neager = "direct"\n'


def left_over(it: Stack) -> list[str]:
    """Directories that belong to no snapshot, or do not yet."""
    names = os.listdir(it.lazysnap.root / "snapshots")
    return [name for name in names if not name.isdecimal()]


def seen(it: Stack, snapshotter: str, target: Path) -> dict[bytes, dict[str, str]]:
    """What a container of the only image of a snapshotter would see.

    Args:
        it: the stack.
        snapshotter: its name.
        target: where to mount it meanwhile; made.
    """
    known = it.containerd.snapshots(snapshotter)
    parents = {parent for parent, _ in known.values()}
    (top,) = (key for key in known if key not in parents)
    target.mkdir()
    key = f"view-{snapshotter}"
    make_view(it.containerd.address, snapshotter, key, top)
    options = ("--snapshotter", snapshotter)
    mount = it.containerd.ctr("snapshots", *options, "mounts", str(target), key)
    subprocess.run(["sh", "-ec", mount], check=True)
    try:
        return tree.read_tree(str(target))
    finally:
        subprocess.run(["umount", str(target)], check=True)
        it.containerd.ctr("snapshots", *options, "rm", key)
