# SPDX-License-Identifier: Apache-2.0
"""Puts the layers of an image together at its mount point. All functions block.

Who may mount uses the kernel's overlay. For ordinary users it is fuse-overlayfs(1), on a FUSE mount that
fusermount3 makes: so in both cases one call of the kernel makes the mount, with its name and restrictions,
and nobody sees the image without them. Programs of an image run with no more rights than who runs them,
and its devices cannot be opened: the mount point can be in the reach of other users.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from lazysnap import fsconfig, fusermount, mounts
from lazysnap.errors import FailedPrecondition, Internal
from lazysnap.paths import Root
from lazysnap.standalone.image import Composition
from lazysnap.standalone.processes import COMBINER

# mount(2) takes a page, with the byte that ends it.
_MOST_DATA = 4095


def check() -> None:
    """See that there is what puts layers together.

    Raises:
        FailedPrecondition: there is not; the hint says what is missing.
    """
    if os.geteuid() != 0 and shutil.which(COMBINER) is None:
        raise FailedPrecondition(
            f"ordinary users need {COMBINER}, which is not installed",
            hint=f"install the package {COMBINER},"
            " or mount inside unshare --user --map-root-user --mount",
        )


def show(root: str, shown: Composition, source: str, target: str) -> None:
    """Mount an image.

    Args:
        root: of the mounts.
        shown: its layers.
        source: what the kernel's list of mounts is to call it.
        target: where.

    Raises:
        FailedPrecondition, Internal: the kernel or a program refused.
    """
    lower = list(shown.lower)
    if not shown.upper:
        # Overlay wants two at least. It is used for one, too, as only it hides whiteouts.
        lower.append(Root(root).empty)
    upper = [("upperdir", shown.upper), ("workdir", shown.work)] if shown.upper else []
    joined = [f"lowerdir={':'.join(lower)}", *(f"{key}={value}" for key, value in upper)]
    if os.geteuid() != 0:
        _show_by_fuse(",".join(joined), bool(upper), source, target)
        return
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | (0 if upper else mounts.MS_RDONLY)
    data = ",".join([*joined, *shown.options])
    if len(os.fsencode(data)) <= _MOST_DATA:
        mounts.mount(source, target, "overlay", flags, data)
        return
    options = (option.partition("=") for option in shown.options)
    settings = [
        *(("lowerdir+", path) for path in lower),
        *upper,
        *((key, value or "on") for key, _, value in options),
        ("source", source),
    ]
    fsconfig.mount_overlay(settings, target, flags)


def _show_by_fuse(options: str, writable: bool, source: str, target: str) -> None:
    access = "rw" if writable else "ro"
    restrictions = f"{access},nosuid,nodev,default_permissions"
    fd = fusermount.mount(f"{restrictions},fsname={source},subtype={COMBINER}", target)
    try:
        # It goes on in the background, until this is unmounted.
        done = subprocess.run(
            [COMBINER, "-o", options, f"/dev/fd/{fd}"],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
    finally:
        os.close(fd)
    if done.returncode != 0:
        raise Internal(f"{COMBINER} ended with {done.returncode}: {done.stderr.strip()}")
