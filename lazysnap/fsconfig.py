# SPDX-License-Identifier: Apache-2.0
"""Overlay mounts by fsopen(2), fsconfig(2), fsmount(2) and move_mount(2).

mount(2) takes one page of options, which many layers do not fit into; here each layer is a call of its
own (`lowerdir+` and `datadir+`, Linux 6.8). Knows nothing of snapshots. Blocks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence

from lazysnap.errors import Internal

# The numbers are the same on all architectures (asm-generic/unistd.h).
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def mount_read_only_overlay(
    lower: Sequence[str], data: Sequence[str], options: Sequence[tuple[str, str]], target: str
) -> None:
    """Mount an overlay that cannot be written to.

    Args:
        lower: lower directories, uppermost first.
        data: data-only lower directories, in the order in which they are asked.
        options: further options, and `source`.
        target: an existing directory.

    Raises:
        Internal: the kernel refused; nothing is left mounted.
    """
    settings = (
        *(("lowerdir+", path) for path in lower),
        *(("datadir+", path) for path in data),
        *options,
    )
    mount_overlay(settings, target, _MOUNT_ATTR_RDONLY)


def mount_overlay(settings: Iterable[tuple[str, str]], target: str, attributes: int) -> None:
    """Mount an overlay.

    Args:
        settings: options, in their order; `lowerdir+` and `datadir+` come once for each directory.
        target: an existing directory.
        attributes: `MOUNT_ATTR_*` of mount_setattr(2); the first ones have the numbers of
            `MS_RDONLY`, `MS_NOSUID` and `MS_NODEV`.

    Raises:
        Internal: the kernel refused; nothing is left mounted.
    """
    try:
        context = _syscall(_FSOPEN, b"overlay", _FSOPEN_CLOEXEC)
        try:
            if attributes & _MOUNT_ATTR_RDONLY:
                _syscall(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
            for key, value in settings:
                _syscall(_FSCONFIG, context, _SET_STRING, key.encode(), os.fsencode(value), 0)
            _syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
            mounted = _syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        except OSError as error:
            raise _refused(target, error, _complaints(context)) from error
        finally:
            os.close(context)
        try:
            place = os.fsencode(target)
            _syscall(_MOVE_MOUNT, mounted, b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(mounted)
    except OSError as error:
        raise _refused(target, error, "") from error


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    words = [
        ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word)
        for word in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _complaints(context: int) -> str:
    """What the kernel says of a refused file system: messages like `e overlay: ...`."""
    found: list[str] = []
    try:
        while len(found) < 8:
            found.append(os.read(context, 4096).decode(errors="replace").strip())
    except OSError:  # there are no more
        pass
    return "; ".join(found)


def _refused(target: str, error: OSError, complaints: str) -> Internal:
    detail = f": {complaints}" if complaints else ""
    return Internal(
        f"cannot mount overlay at {target}: {error.strerror}{detail}", reason="mount-failed"
    )
