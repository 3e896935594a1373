# SPDX-License-Identifier: Apache-2.0
"""Time stamps of cached files that mean something: when one was used, and that one was checked.

Access times say when a file was last used, to the hour. The modification time of an object is its
*seal*: computed from its digest, and set when its bytes were checked and are on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

NANOSECONDS = 1_000_000_000
_libc = ctypes.CDLL(None, use_errno=True)
# Opening marks an object as used at most this often, so that reads cost no writes.
_TOUCH_NANOSECONDS = 3600 * NANOSECONDS
# From utimensat(2); `os.utime` cannot leave one of the two times alone, and needs more than O_PATH.
_NOW = (1 << 30) - 1
_OMIT = (1 << 30) - 2
_AT_EMPTY_PATH = 0x1000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _set_times(fd: int, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    """utimensat(2); each time is seconds and nanoseconds, the latter may be `_NOW` or `_OMIT`."""
    times = (_Timespec * 2)(_Timespec(*accessed), _Timespec(*modified))
    if _libc.utimensat(fd, b"", times, _AT_EMPTY_PATH) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "utimensat")


def touch(fd: int, status: os.stat_result) -> None:
    """Note that a file of the cache is used, unless that was noted within the last hour.

    Its modification time stays, as it may be a seal.

    Args:
        fd: the file.
        status: its status a moment ago.
    """
    if abs(time.time_ns() - status.st_atime_ns) > _TOUCH_NANOSECONDS:
        with contextlib.suppress(OSError):  # on a read-only file system
            _set_times(fd, (0, _NOW), (0, _OMIT))


def seal_time(key: bytes) -> int:
    """The modification time, in nanoseconds, that marks the object `key` as sealed.

    Within 31 bits of seconds, which every file system can store.
    """
    seconds = int.from_bytes(key[:4], "big") >> 1
    return seconds * NANOSECONDS + int.from_bytes(key[4:8], "big") % NANOSECONDS


def seal(fd: int, key: bytes) -> None:
    """Set the seal of an object.

    Raises:
        OSError: the disk refuses.
    """
    # Both times: inotify takes a change of the modification time alone for a change of the file.
    accessed = divmod(os.fstat(fd).st_atime_ns, NANOSECONDS)
    _set_times(fd, accessed, divmod(seal_time(key), NANOSECONDS))


def break_seal(fd: int) -> None:
    """Make an object one that is not sealed, and that looks as if it was written just now.

    Raises:
        OSError: the disk refuses.
    """
    accessed = divmod(os.fstat(fd).st_atime_ns, NANOSECONDS)  # both times, as above
    _set_times(fd, accessed, (0, _NOW))


def sync_filesystem(fd: int) -> None:
    """Write all that is dirty in the file system of `fd` to its disk (syncfs(2)).

    Raises:
        OSError: the disk refused some of it.
    """
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "syncfs")
