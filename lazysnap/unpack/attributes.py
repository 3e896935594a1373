# SPDX-License-Identifier: Apache-2.0
"""Owner, xattrs, mode and times of files, in the order in which the kernel does not undo them.

A change of owner takes away setuid, setgid and file capabilities, and everything changes the ctime: so
owner first, then xattrs, then mode, then times. A file that is not open for writing is opened with O_PATH
and changed through /proc/self/fd, which reaches this very inode and follows nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator

from lazysnap.errors import FormatError
from lazysnap.owners import possible_owners
from lazysnap.unpack.entries import Entry
from lazysnap.unpack.root import Directory, show

Xattrs = Iterable[tuple[bytes, bytes]]
_O_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_XATTRS = (errno.ENOTSUP, errno.EOPNOTSUPP)
_SHOWN = 20


class Attributes:
    """Sets attributes.

    Args:
        same_owner: give files to the owner that the tar says, if there is that owner here.
        refused: prefixes of xattrs that are never set.

    Attributes:
        same_owner: see above.
        ignored: how many xattrs were not set.
        examples: some of them.
    """

    def __init__(self, *, same_owner: bool, refused: tuple[bytes, ...]) -> None:
        self.ignored = 0
        self.examples: list[str] = []
        self.same_owner = same_owner
        self._refused = refused
        self._owners = possible_owners()

    def owner(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner on disk for a user and a group of the tar."""
        return (uid, gid) if self._owners is None else self._owners.of(uid, gid)

    def of_file(self, fd: int, entry: Entry) -> None:
        """Of a regular file that is open."""
        if self.same_owner:
            os.chown(fd, *self.owner(entry.uid, entry.gid))
        if entry.xattrs:
            self.xattrs(fd, entry.xattrs, stat.S_IFREG)
        os.chmod(fd, entry.mode)
        os.utime(fd, ns=(entry.atime_ns, entry.mtime_ns))

    def of_directory(self, fd: int, uid: int, gid: int, xattrs: Xattrs) -> None:
        """Of a directory that is open; mode and times come when all is in it."""
        if self.same_owner:
            os.chown(fd, *self.owner(uid, gid))
        self.xattrs(fd, xattrs, stat.S_IFDIR)

    def inherit(self, fd: int, lower: int) -> tuple[int, tuple[int, int]]:
        """Of a directory that a layer leaves out: those that it has below.

        Args:
            fd: the directory, open.
            lower: the one below, open.

        Returns:
            Mode and times, which come when all is in it.
        """
        status = os.fstat(lower)
        names = [os.fsencode(name) for name in os.listxattr(lower)]
        xattrs = [(n, os.getxattr(lower, n)) for n in names if not n.startswith(b"trusted.")]
        self.of_directory(fd, status.st_uid, status.st_gid, xattrs)
        return stat.S_IMODE(status.st_mode), (status.st_atime_ns, status.st_mtime_ns)

    def of_symlink(self, directory: Directory, name: bytes, entry: Entry) -> None:
        """Of a symbolic link, which has no mode."""
        if self.same_owner:
            owner = self.owner(entry.uid, entry.gid)
            os.chown(name, *owner, dir_fd=directory.fd, follow_symlinks=False)
        if entry.xattrs:
            path = b"/proc/self/fd/%d/%s" % (directory.fd, name)
            self.xattrs(path, entry.xattrs, stat.S_IFLNK)
        times = entry.atime_ns, entry.mtime_ns
        os.utime(name, ns=times, dir_fd=directory.fd, follow_symlinks=False)

    def of_special(self, directory: Directory, name: bytes, entry: Entry, rdev: int) -> None:
        """Of a device or a FIFO that was just made."""
        with opened(directory, name) as (fd, status):
            if status.st_nlink != 1 or status.st_rdev != rdev or stat.S_ISREG(status.st_mode):
                raise FormatError("somebody else changes the directory")
            self._through(fd, status, entry)

    def of_link(
        self, directory: Directory, name: bytes, entry: Entry, same: os.stat_result
    ) -> None:
        """Of a hard link, by the entry of the link, as containerd sets them.

        Args:
            directory: it is in.
            name: of it.
            entry: of the tar.
            same: the file that it must be.
        """
        with opened(directory, name) as (fd, status):
            if (status.st_dev, status.st_ino) != (same.st_dev, same.st_ino):
                raise FormatError("somebody else changes the directory")
            if stat.S_ISLNK(status.st_mode):
                self.of_symlink(directory, name, entry)
            else:
                self._through(fd, status, entry)

    def _through(self, fd: int, status: os.stat_result, entry: Entry) -> None:
        path = b"/proc/self/fd/%d" % fd
        # Not when it is the same: the capabilities, which few tars repeat with a link, would go.
        owner = self.owner(entry.uid, entry.gid)
        if self.same_owner and (status.st_uid, status.st_gid) != owner:
            os.chown(path, *owner)
        self.xattrs(path, entry.xattrs, stat.S_IFMT(status.st_mode), follow=True)
        os.chmod(path, entry.mode)
        os.utime(path, ns=(entry.atime_ns, entry.mtime_ns))

    def xattrs(
        self, where: int | bytes, xattrs: Xattrs, kind: int, *, follow: bool = False
    ) -> None:
        """Set xattrs; those that containerd's applier leaves out too are left out and counted.

        Args:
            where: an open file, or a path.
            xattrs: names and values.
            kind: type of the file, as in st_mode.
            follow: whether the path is a link to an open file.
        """
        for name, value in xattrs:
            if name.startswith(self._refused):
                self._ignore(name)
                continue
            try:
                if isinstance(where, int):
                    os.setxattr(where, name, value)
                else:
                    os.setxattr(where, name, value, follow_symlinks=follow)
            except OSError as error:
                plain = kind in (stat.S_IFREG, stat.S_IFDIR)
                special = error.errno == errno.EPERM and name.startswith(b"user.") and not plain
                # Of ordinary users, and of root of a user namespace.
                ours = error.errno == errno.EPERM and name.startswith(b"security.") and self._owners
                if not special and not ours and error.errno not in _NO_XATTRS:
                    error.strerror = f"xattr {show(name)}: {error.strerror}"
                    raise
                self._ignore(name)

    def _ignore(self, name: bytes) -> None:
        self.ignored += 1
        if len(self.examples) < _SHOWN and show(name) not in self.examples:
            self.examples.append(show(name))


def refused_xattrs(opaque: bytes) -> tuple[bytes, ...]:
    """Prefixes of xattrs that a layer must not set.

    Args:
        opaque: xattr that marks opaque directories.
    """
    # what overlay obeys there
    return (b"trusted.", b"user.overlay.") if opaque.startswith(b"user.") else (b"trusted.",)


@contextlib.contextmanager
def opened(directory: Directory, name: bytes) -> Iterator[tuple[int, os.stat_result]]:
    """A file of any type, opened for nothing but to be named, and its status."""
    fd = os.open(name, _O_PATH, dir_fd=directory.fd)
    try:
        yield fd, os.fstat(fd)
    finally:
        os.close(fd)
