# SPDX-License-Identifier: Apache-2.0
"""Notices when somebody writes to an object: inotify(7) on the directories of objects.

The kernel reads objects without asking us, so a change must be noticed when it happens. We never write
to what is among the objects ourselves. Knows nothing of what is done about it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

from lazysnap.errors import Internal

_IN_MODIFY = 0x2
_IN_CLOSE_WRITE = 0x8
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
# watch, mask, cookie, length of the name that follows
_EVENT = struct.Struct("iIII")
_READ_SIZE = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)


class ObjectWatch:
    """Watches the directories of objects.

    Args:
        root: the directory with the 256 directories.

    Raises:
        Internal: the kernel allows no more watches.
    """

    def __init__(self, root: str) -> None:
        self.fd = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self.fd < 0:
            raise _refused()
        for number in range(256):
            path = os.path.join(root, f"{number:02x}")
            mask = _IN_MODIFY | _IN_CLOSE_WRITE
            if _libc.inotify_add_watch(self.fd, os.fsencode(path), mask) < 0:
                error = _refused()
                os.close(self.fd)
                raise error

    def close(self) -> None:
        """End watching."""
        os.close(self.fd)

    def changed(self) -> set[bytes]:
        """The keys of objects that were written to since the last call; does not wait.

        `fd` is readable when there are some.
        """
        found: set[bytes] = set()
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self.fd, _READ_SIZE):
                at = 0
                while at < len(events):
                    length = _EVENT.unpack_from(events, at)[3]
                    at += _EVENT.size
                    name = events[at : at + length].rstrip(b"\0")
                    at += length
                    with contextlib.suppress(ValueError):
                        key = bytes.fromhex(name.decode("ascii", "replace"))
                        if len(key) == 32:
                            found.add(key)
        return found


def _refused() -> Internal:
    return Internal(
        f"the cache cannot be watched for changes: {os.strerror(ctypes.get_errno())}",
        hint="raise fs.inotify.max_user_watches or fs.inotify.max_user_instances with sysctl",
        reason="no-watch",
    )
