# SPDX-License-Identifier: Apache-2.0
"""The directory with all state of a daemon: one process at a time uses it."""

from __future__ import annotations

import fcntl
import json
import os

import lazysnap
from lazysnap import atomic_files, log
from lazysnap.errors import ConfigError
from lazysnap.paths import Root

_log = log.get(__name__)


def lock_root(root: str, command: str) -> int:
    """Make sure that no other daemon uses a root, and make it if it is not there.

    Args:
        root: directory of all state.
        command: that is about to use it.

    Returns:
        A descriptor; the root is taken as long as it is open.

    Raises:
        ConfigError: another one uses it, or it cannot be used.
    """
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        fd = os.open(Root(root).lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the root {root} cannot be used: {error.strerror}",
            hint=f"lazysnap {command} must run as root; choose another directory with --root",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConfigError(
            f"another lazysnap {command} uses {root}",
            hint="stop it first (systemctl stop lazysnap), or choose another --root",
        ) from error
    return fd


def introduce(root: str, address: str) -> None:
    """Say in `daemon.json` who serves the root; it counts as long as `lock` is held.

    Args:
        root: that is locked.
        address: socket at which this process answers.
    """
    path = Root(root).daemon_facts
    facts = {"pid": os.getpid(), "version": lazysnap.__version__, "address": address}
    try:
        # They count only while this process lives.
        atomic_files.replace(path, json.dumps(facts).encode(), sync=False)
    except OSError as error:
        _log.warning("cannot write who serves the root", path=path, error=error)
