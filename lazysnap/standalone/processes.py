# SPDX-License-Identifier: Apache-2.0
"""Processes of a root, and of mount namespaces, found in /proc. All functions block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def shard_processes(root: str) -> Iterator[tuple[int, int]]:
    """Process ids and descriptors of shards; one is closed when the next is asked for.

    Keepers that are about to start have their command line, and no lock yet that would show them.

    Args:
        root: as shards were started with.
    """
    wanted = {b"lazysnap.shard.keeper", os.fsencode(root)}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            process = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            words: set[bytes] = set()
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                words = set(file.read().split(b"\0"))
            if wanted <= words:
                yield int(name), process
        finally:
            os.close(process)


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
        root: whose shards do not count, as they would keep it for ever.
    """
    shards = {pid for pid, _ in shard_processes(root)}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in shards:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/mnt") == name:
                    return True
    return False
