# SPDX-License-Identifier: Apache-2.0
"""mount(2), umount2(2), syncfs(2) and the kernel's list of mounts.

Calls the C library directly: mount(8) and umount(8) cost a process each, follow fstab and cannot be
told to stay off symbolic links. Knows nothing of snapshots. All functions block; none follows a
symbolic link in the last component when it unmounts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lazysnap import fusermount
from lazysnap.errors import Internal

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_WHOLE_ID_RANGE = ["0", "0", "4294967295"]

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)).

    Args:
        mount_id: the kernel's number of the mount.
        parent_id: the number of the mount it sits on.
        device: `major:minor` of the file system.
        root: the directory of that file system which is mounted.
        path: where it is mounted.
        options: options of this mount, comma separated.
        fstype: type of the file system, with its subtype (`fuse.lazysnap`).
        source: what the file system calls its source.
        super_options: options of the file system, comma separated.
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    path: str
    options: str
    fstype: str
    source: str
    super_options: str


@dataclass(frozen=True, slots=True)
class OverlayFacts:
    """What this kernel and this user namespace mean for overlay mounts.

    Args:
        supported: the kernel knows the file system, or can load it.
        index: it has the `index` feature.
        user_namespace: this process runs in a user namespace of its own.
        privileged: attributes `trusted.*` and devices are for this process: it is root, and not only of
            a user namespace.
    """

    supported: bool
    index: bool
    user_namespace: bool
    privileged: bool

    @property
    def opaque_xattr(self) -> bytes:
        """The attribute by which overlay marks opaque directories here."""
        return b"trusted.overlay.opaque" if self.privileged else b"user.overlay.opaque"


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2).

    Args:
        source: device, directory, or a name for display.
        target: an existing directory or file.
        fstype: file system type; empty for binds and remounts.
        flags: `MS_*`.
        data: options of the file system, comma separated.

    Raises:
        Internal: the kernel refused.
    """
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(fstype) or None,
        flags,
        os.fsencode(data) or None,
    )
    if result != 0:
        code = ctypes.get_errno()
        raise Internal(
            f"cannot mount {fstype or source} at {target}: {os.strerror(code)}",
            hint="see the kernel log (dmesg) for details" if code == errno.EINVAL else None,
            reason="mount-failed",
        )


def bind(source: str, target: str, *, read_only: bool = False) -> None:
    """Show a directory at a second place.

    Args:
        source: the directory.
        target: an existing directory.
        read_only: refuse writing through the new place.

    Raises:
        Internal: the kernel refused; nothing is left mounted.
    """
    mount(source, target, flags=MS_BIND)
    if not read_only:
        return
    try:
        # mount(2) ignores MS_RDONLY in the call that makes the bind
        mount(source, target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    except Internal:
        unmount(target)
        raise


def unmount(target: str, *, lazy: bool = True) -> bool:
    """umount2(2) of the topmost mount at a path; for ordinary users, fusermount3(1).

    Args:
        target: the mount point.
        lazy: detach it now and let the kernel finish when its last user is gone; this also works
            when the server of a FUSE mount is dead.

    Returns:
        Whether something was mounted there.

    Raises:
        Internal: the kernel refused.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOENT):
        return False
    if code == errno.EPERM and os.geteuid() != 0:
        if mounted_at(target) is None:
            return False
        fusermount.unmount(target, lazy=lazy)
        return True
    raise Internal(f"cannot unmount {target}: {os.strerror(code)}", reason="unmount-failed")


def mount_points() -> list[MountPoint]:
    """All mounts of this process's mount namespace, in the kernel's order (lower ones first).

    Raises:
        Internal: the list cannot be read.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            # one read: the kernel builds the list anew for each, and mounts come and go meanwhile
            return list(parse_mountinfo(file.read().splitlines()))
    except OSError as error:
        raise Internal(f"cannot read /proc/self/mountinfo: {error.strerror}") from error


def parse_mountinfo(lines: Iterable[bytes]) -> Iterator[MountPoint]:
    """Read lines in the format of proc_pid_mountinfo(5); skips those it does not understand."""
    for line in lines:
        fields = line.split(b" ")
        try:
            # any number of optional fields sits between the options and the separator
            dash = fields.index(b"-", 6)
            fstype, source, super_options = fields[dash + 1 : dash + 4]
            numbers = int(fields[0]), int(fields[1])
        except ValueError:
            continue
        yield MountPoint(
            numbers[0],
            numbers[1],
            *(_unescape(field) for field in (*fields[2:6], fstype, source, super_options)),
        )


def _unescape(field: bytes) -> str:
    """Undo the kernel's octal escapes, which it uses for blank, tab, newline and backslash."""
    if b"\\" in field:
        field = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
    return os.fsdecode(field)


def mounted_at(path: str, points: Iterable[MountPoint] | None = None) -> MountPoint | None:
    """The topmost mount exactly at a path.

    Args:
        path: absolute, without symbolic links.
        points: what `mount_points` returned, to look up several paths in one list.
    """
    found = None
    for point in mount_points() if points is None else points:
        if point.path == path:
            found = point
    return found


def mounted_below(path: str, points: Iterable[MountPoint] | None = None) -> list[MountPoint]:
    """The mounts at a path and below it, topmost first, so that they can be unmounted in order.

    Args:
        path: absolute, without symbolic links.
        points: what `mount_points` returned, to look up several paths in one list.
    """
    below = path.rstrip("/") + "/"
    found = [
        point
        for point in (mount_points() if points is None else points)
        if point.path == path or point.path.startswith(below)
    ]
    found.reverse()
    return found


def unmount_below(path: str) -> int:
    """Detach everything that is mounted at a path or below it.

    Args:
        path: absolute, without symbolic links.

    Returns:
        How many mounts there were.

    Raises:
        Internal: the kernel refused one.
    """
    found = mounted_below(path)
    for point in found:
        unmount(point.path)
    return len(found)


def overlay_facts() -> OverlayFacts:
    """Ask the kernel what overlay mounts need here."""
    try:
        with open("/proc/filesystems", encoding="ascii") as file:
            known = any(line.split()[-1] == "overlay" for line in file)
    except OSError:
        known = False
    loadable = os.path.isdir(f"/lib/modules/{os.uname().release}/kernel/fs/overlayfs")
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            user_namespace = file.readline().split() != _WHOLE_ID_RANGE
    except OSError:  # a kernel without user namespaces
        user_namespace = False
    return OverlayFacts(
        supported=known or loadable,
        index=os.path.exists("/sys/module/overlay/parameters/index"),
        user_namespace=user_namespace,
        privileged=os.geteuid() == 0 and not user_namespace,
    )


class _Dirent(ctypes.Structure):
    """struct dirent of readdir64(3)."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_uint16),
        ("d_type", ctypes.c_uint8),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = (ctypes.c_char_p,)
_libc.readdir64.restype = ctypes.POINTER(_Dirent)
_libc.readdir64.argtypes = (ctypes.c_void_p,)
_libc.closedir.argtypes = (ctypes.c_void_p,)


def supports_d_type(directory: str) -> bool:
    """Whether directory listings of a file system tell the type of each entry.

    Overlay needs that to show whiteouts right; XFS made with `ftype=0` lacks it.

    Args:
        directory: writable; a temporary directory is made in it.

    Raises:
        Internal: the directory cannot be written or read.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="new-dtype-", dir=directory) as probe:
            # "." and ".." alone would not tell: some file systems know only those
            os.close(os.open(f"{probe}/file", os.O_CREAT | os.O_WRONLY, 0o600))
            return all(_entry_types(probe))
    except OSError as error:
        raise Internal(f"cannot examine {directory}: {error.strerror}") from error


def _entry_types(directory: str) -> list[int]:
    stream = _libc.opendir(os.fsencode(directory))
    if not stream:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), directory)
    try:
        types = []
        while entry := _libc.readdir64(stream):
            types.append(entry.contents.d_type)
    finally:
        _libc.closedir(stream)
    return types


_libc.syncfs.argtypes = (ctypes.c_int,)


def sync_filesystem(path: str) -> None:
    """syncfs(2): wait until everything written to a path's file system is on disk.

    Args:
        path: a directory on it.

    Raises:
        Internal: something could not be written.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), path)
        finally:
            os.close(fd)
    except OSError as error:
        raise Internal(
            f"cannot write the file system of {path} to disk: {error.strerror}",
            hint="see the kernel log (dmesg) for I/O errors",
            reason="sync-failed",
        ) from error
