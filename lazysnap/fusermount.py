# SPDX-License-Identifier: Apache-2.0
"""fusermount3(1), which mounts and unmounts FUSE file systems for ordinary users. All functions block."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess

from lazysnap.errors import FailedPrecondition, Internal

_PROGRAM = "fusermount3"


def check() -> None:
    """See that it is there and may do its work.

    Raises:
        FailedPrecondition: it is not; the hint says what is missing.
    """
    path = shutil.which(_PROGRAM)
    if path is None:
        raise FailedPrecondition(
            f"ordinary users mount by {_PROGRAM}, which is not there",
            hint="install the package fuse3, or mount inside unshare --user --map-root-user --mount",
        )
    status = os.stat(path)
    if not status.st_mode & stat.S_ISUID or status.st_uid != 0:
        raise FailedPrecondition(
            f"ordinary users mount by {path}, which does not run as root",
            hint=f"install the package fuse3 again, or chown root {path} && chmod u+s {path}",
        )


def mount(options: str, target: str) -> int:
    """Mount a FUSE file system that nobody serves yet.

    Args:
        options: as after `mount -o`.
        target: a directory that the user may write to.

    Returns:
        Its descriptor of /dev/fuse, which whoever serves it gets.

    Raises:
        FailedPrecondition: it was refused.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # As libfuse does it (lib/mount.c, fuse_mount_fusermount).
        done = subprocess.run(
            [_PROGRAM, "-o", options, "--", target],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            ours.setblocking(False)
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            if descriptors:
                return descriptors[0]
    raise FailedPrecondition(f"cannot mount at {target}: {_said(done)}")


def unmount(target: str, *, lazy: bool) -> None:
    """Unmount a FUSE file system of this user.

    Args:
        target: where it is mounted.
        lazy: also while it is in use.

    Raises:
        Internal: it is in use, or not this user's.
    """
    words = [_PROGRAM, "-u", *(["-z"] if lazy else []), "--", target]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Internal(
            f"cannot unmount {target}: {_PROGRAM}: {error.strerror}", reason="unmount-failed"
        ) from error
    if done.returncode != 0:
        raise Internal(f"cannot unmount {target}: {_said(done)}", reason="unmount-failed")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip() or f"{_PROGRAM} ended with {done.returncode}"
