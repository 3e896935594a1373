# SPDX-License-Identifier: Apache-2.0
"""Processes of a root, and of mount namespaces, found in /proc. All functions block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

COMBINER = "fuse-overlayfs"
"""What puts layers together for ordinary users."""


def serving_processes(root: str) -> Iterator[tuple[int, int]]:
    """Process ids and descriptors of what serves mounts; one is closed when the next is asked for.

    Keepers that are about to start have their command line, and no lock yet that would show them.

    Args:
        root: as they were started with.
    """
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            process = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            words: list[bytes] = []
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            if _is_shard(words, os.fsencode(root)) or _combines(words, os.fsencode(root)):
                yield int(name), process
        finally:
            os.close(process)


def _is_shard(words: list[bytes], root: bytes) -> bool:
    return b"lazysnap.shard.keeper" in words and root in words


def _combines(words: list[bytes], root: bytes) -> bool:
    """Whether a command line is that of a fuse-overlayfs of our layers."""
    return words[:1] == [COMBINER.encode()] and any(root + b"/" in word for word in words)


def namespace() -> str:
    """Our mount namespace, as the kernel calls it."""
    try:
        return os.readlink("/proc/self/ns/mnt")
    except OSError:
        return ""


def namespace_is_in_use(name: str, root: str) -> bool:
    """Whether a process that we can look at is in a mount namespace.

    Args:
        name: of the namespace.
        root: what serves its mounts does not count, as that would keep it for ever.
    """
    serving = {pid for pid, _ in serving_processes(root)}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in serving:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/mnt") == name:
                    return True
    return False
