# SPDX-License-Identifier: Apache-2.0
"""Notices when somebody writes to an object, or opens one: inotify(7) on the directories of objects.

The kernel reads objects without asking us, so a change must be noticed when it happens. We never write
to what is among the objects ourselves. That something is opened is told on demand only; overlay tells it
like any program (seen with Linux 6.18). Knows nothing of what is done about it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

from lazysnap.errors import Internal

_IN_MODIFY = 0x2
_IN_CLOSE_WRITE = 0x8
_IN_OPEN = 0x20
_IN_Q_OVERFLOW = 0x4000
_CHANGES = _IN_MODIFY | _IN_CLOSE_WRITE
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

    Attributes:
        missed: more has happened than the kernel remembers; for whoever deals with that to unset.

    Raises:
        Internal: the kernel allows no more watches.
    """

    def __init__(self, root: str) -> None:
        self.fd = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self.fd < 0:
            raise _refused()
        self.missed = False
        self._root = os.fsencode(root)
        self._tells_opens = False
        try:
            self._watch(_CHANGES)
        except Internal:
            os.close(self.fd)
            raise

    def _watch(self, mask: int) -> None:
        for number in range(256):
            if _libc.inotify_add_watch(self.fd, b"%s/%02x" % (self._root, number), mask) < 0:
                raise _refused()

    def tell_opens(self, wanted: bool) -> None:
        """From now on, tell what is opened, or no longer."""
        if wanted != self._tells_opens:
            self._watch(_CHANGES | _IN_OPEN if wanted else _CHANGES)
            self._tells_opens = wanted

    def close(self) -> None:
        """End watching."""
        os.close(self.fd)

    def take(self) -> tuple[set[bytes], list[bytes]]:
        """Take the events since the last call; does not wait.

        `fd` is readable when there is something.

        Returns:
            The keys of objects that were written to; and of those that were opened, in that order,
            some perhaps repeatedly.
        """
        changed: set[bytes] = set()
        opened: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self.fd, _READ_SIZE):
                at = 0
                while at < len(events):
                    _, mask, _, length = _EVENT.unpack_from(events, at)
                    at += _EVENT.size
                    name = events[at : at + length].rstrip(b"\0")
                    at += length
                    if mask & _IN_Q_OVERFLOW:
                        self.missed = True
                    with contextlib.suppress(ValueError):
                        key = bytes.fromhex(name.decode("ascii", "replace"))
                        if len(key) != 32:
                            continue
                        if mask & _CHANGES:
                            changed.add(key)
                        else:
                            opened.append(key)
        return changed, opened


def _refused() -> Internal:
    return Internal(
        f"the cache cannot be watched for changes: {os.strerror(ctypes.get_errno())}",
        hint="raise fs.inotify.max_user_watches or fs.inotify.max_user_instances with sysctl",
        reason="no-watch",
    )
