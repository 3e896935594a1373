# SPDX-License-Identifier: Apache-2.0
"""The cache on disk: verified file contents, named by what they contain.

All processes of a root share it, and each may be killed at any time. In the order in which to read:

- `object_states`: what a complete content, an *object*, goes through; the table of it.
- `objects`, `object_files`: what is done to objects, and how that is done on the disk.
- `stamps`: the time stamps that say when a file was used, and that it was checked.
- `partial`: files of which some chunks are there.
- `inventory`: what is in the cache.
- `eviction`: keeps it within its limits.
- `watch`: notices that an object is changed or opened by somebody else.
- `pruning`, `verification`: what `lazysnap cache` removes and checks.
"""

from __future__ import annotations

import os

from lazysnap.cache.objects import ObjectStore
from lazysnap.cache.partial import PartialFile
from lazysnap.paths import CacheDirectory

__all__ = ["Cache", "ObjectStore", "PartialFile"]


class Cache:
    """The parts of the cache below one directory.

    Args:
        root: the directory, e.g. `/var/lib/lazysnap/cache`; created when missing.
    """

    def __init__(self, root: str) -> None:
        self.paths = CacheDirectory(os.path.abspath(root))
        self.root = self.paths.path
        self.index = self.paths.indexes
        self.partial = self.paths.partial
        self.trees = self.paths.trees
        for directory in (self.root, self.index, self.partial, self.trees):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.objects = ObjectStore(self.paths.objects, self.paths.aside)

    def recover_after_boot(self) -> None:
        """Distrust objects that may not have reached the disk; to be called before the kernel reads any.

        Looks at all objects, but only once after each boot, or mount of the file system.

        Raises:
            OSError: the cache cannot be read or written.
        """
        now = f"{_boot_id()} {_mount_id(self.root)}\n"
        try:
            with open(self.paths.boot) as file:
                if file.read(200) == now:
                    return
        except FileNotFoundError:
            pass
        self.objects.recover()
        with open(self.paths.boot, "w") as file:
            file.write(now)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _mount_id(path: str) -> str:
    """The kernel's number of the mount that a directory is on (proc_pid_fdinfo(5))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
            return lines["mnt_id"].strip()
    finally:
        os.close(fd)
