# SPDX-License-Identifier: Apache-2.0
"""The directory with all state of standalone mounts: where it is, who may use it, whose turn it is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lazysnap import fusermount, log, mounts
from lazysnap.errors import ConfigError, FailedPrecondition
from lazysnap.paths import DEFAULT_STANDALONE_ROOT, Root
from lazysnap.shard.settings import FIRST_XATTR_SHARD

_log = log.get(__name__)
_POLL_SECONDS = 0.05
_TELL_SECONDS = 1.0
# unix(7): sun_path has 108 bytes, with the one that ends it.
_MOST_SOCKET = 107
# ioctl_ns(2): a descriptor of the user namespace that owns a namespace.
_NS_GET_USERNS = 0xB701


def default_root() -> str:
    """`/var/lib/lazysnap-standalone`; for ordinary users, also in a user namespace, one of their own."""
    if mounts.overlay_facts().privileged:
        return DEFAULT_STANDALONE_ROOT
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(os.path.abspath(home), "lazysnap")


def check_mounting() -> None:
    """See that this process may mount and unmount, by itself or by fusermount3.

    Raises:
        FailedPrecondition: it may not; the hint says what is missing.
    """
    if os.geteuid() != 0:
        fusermount.check()
    elif not _owns_mounts():
        raise FailedPrecondition(
            "this user namespace has no mounts of its own",
            hint="unshare --user --map-root-user --mount makes one that has",
        )


def check_fuse() -> None:
    """See that this process may serve a file system.

    Raises:
        FailedPrecondition: it may not; the hint says what is missing.
    """
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise FailedPrecondition(
            f"/dev/fuse cannot be used: {error.strerror}",
            hint="modprobe fuse; chmod 666 /dev/fuse, as udev does; give a container the device",
        ) from error


def _owns_mounts() -> bool:
    """Whether our user namespace is the one that the mount namespace belongs to."""
    try:
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
            try:
                return os.fstat(owner).st_ino == os.stat("/proc/self/ns/user").st_ino
            finally:
                os.close(owner)
        finally:
            os.close(namespace)
    except PermissionError:
        return False  # it belongs to a namespace above ours
    except OSError:
        return True  # a kernel without namespaces


def exists(root: str) -> bool:
    """Whether there ever was a standalone mount in a root."""
    return os.path.exists(Root(root).standalone_mark)


@asynccontextmanager
async def taken(root: str) -> AsyncIterator[None]:
    """Be the only command that uses a root, and make it if it is not there.

    Args:
        root: absolute, without symbolic links.

    Raises:
        ConfigError: it is not a root of standalone mounts, or cannot be used.
    """
    paths = Root(root)
    if len(os.fsencode(paths.shard_socket(FIRST_XATTR_SHARD))) > _MOST_SOCKET:
        raise ConfigError(
            f"the path {root} is too long for the sockets in it",
            hint="choose a directory with a shorter path with --root",
        )
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        names = set(os.listdir(root)) - {os.path.basename(paths.lock)}
        if names and not exists(root):
            raise ConfigError(
                f"{root} contains something else",
                hint="give an empty directory, and not the one of lazysnap serve, with --root",
            )
        fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the root {root} cannot be used: {error.strerror}",
            hint="choose another directory with --root",
        ) from error
    try:
        await _wait_for_turn(fd, root)
        with open(paths.standalone_mark, "w"):
            pass
        yield
    finally:
        os.close(fd)


async def _wait_for_turn(fd: int, root: str) -> None:
    began = trio.current_time()
    told = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told and trio.current_time() - began > _TELL_SECONDS:
                _log.warning("waiting for another lazysnap command", root=root)
                told = True
            await trio.sleep(_POLL_SECONDS)
        else:
            return
