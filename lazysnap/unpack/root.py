# SPDX-License-Identifier: Apache-2.0
"""Directories below a root, which no path can leave.

A path is followed one name at a time from an open directory, never by the kernel through several, and
links on the way are read and followed here, as in a chroot: `..` and absolute targets end at the root.
So it does not matter what somebody else puts in place of a directory meanwhile. This does what
openat2(2) with RESOLVE_IN_ROOT does, and also makes directories on the way, follows links to what does
not exist yet (containerd's fs.RootPath does), and costs one system call for most directories, since
those that were used last stay open.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable

from lazysnap.errors import FormatError

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 255
"""In one path, as containerd's RootPath; why this walk is not `layers.links.follow` is said there."""
_MAX_STEPS = 20_000_000
"""Through the targets of links, in all paths together."""
_KEPT = 64


class Directory:
    """An open directory; closed when nobody has it any more.

    Args:
        fd: taken over.
        path: from the root, without links; empty for the root itself.
    """

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: bytes) -> None:
        self.fd = fd
        self.path = path

    def __del__(self) -> None:
        os.close(self.fd)

    def child(self, name: bytes) -> bytes:
        """The path of a name in it."""
        return self.path + b"/" + name if self.path else name


class NotADirectoryThere(FormatError):
    """Something on the way of a path is neither a directory nor a link."""


class Root:
    """A tree.

    Args:
        fd: of its uppermost directory; taken over.
        make: makes a missing directory and opens it; without it nothing is made.
        replace: removes something that is no directory if a directory may take its place, and says
            whether it did.
        found: told about each directory that was there and is opened.
    """

    def __init__(
        self,
        fd: int,
        make: Callable[[Directory, bytes], Directory] | None = None,
        replace: Callable[[Directory, bytes], bool] | None = None,
        found: Callable[[Directory], None] = lambda _: None,
    ) -> None:
        self.top = Directory(fd, b"")
        self._make = make
        self._replace = replace
        self._found = found
        self._open: dict[bytes, Directory] = {}
        self._last: tuple[bytes, Directory] = (b"", self.top)
        self._steps = 0

    def forget(self) -> None:
        """A directory or a link was removed: what is known of paths may be wrong."""
        self._open.clear()
        self._last = (b"", self.top)

    def keep(self, directory: Directory) -> None:
        """Remember an open directory under its path."""
        if len(self._open) >= _KEPT:
            del self._open[next(iter(self._open))]
        self._open[directory.path] = directory

    def directory(self, path: bytes) -> Directory:
        """A directory; what is missing on the way is made.

        Args:
            path: names with one slash between them; may lead through links.

        Raises:
            FormatError: something on the way is no directory.
            FileNotFoundError: it is not there, and nothing is to be made.
            OSError: the kernel refused.
        """
        last, found = self._last
        if last != path:
            found = self._walk(path)
            self._last = path, found
        return found

    def find(self, path: bytes) -> Directory | None:
        """A directory, or None if there is nothing; errors as for `directory`."""
        try:
            return self.directory(path)
        except FileNotFoundError:
            return None

    def _walk(self, path: bytes) -> Directory:
        here, rest = self._known(path)
        left = rest.split(b"/")
        left.reverse()
        links = 0
        while left:
            name = left.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                left.extend(reversed(os.path.dirname(here.path).split(b"/")))
                here = self.top
                continue
            below = self._open.get(here.child(name)) or self._step(here, name)
            if isinstance(below, Directory):
                here = below
                continue
            links += 1
            names = below.split(b"/")
            self._steps += len(names)
            if links > _MAX_LINKS or self._steps > _MAX_STEPS:
                raise FormatError("too many symbolic links on the way")
            if below.startswith(b"/"):
                here = self.top
            left.extend(reversed(names))
        return here

    def _known(self, path: bytes) -> tuple[Directory, bytes]:
        """The nearest open directory on the way, and the rest of the way."""
        end = len(path)
        while end > 0:
            found = self._open.get(path[:end])
            if found is not None:
                return found, path[end + 1 :]
            end = path.rfind(b"/", 0, end)
        return self.top, path

    def _step(self, here: Directory, name: bytes) -> Directory | bytes:
        """One name further; returns the target if it is a link."""
        for _ in range(3):  # somebody else may change it in between
            try:
                fd = os.open(name, OPEN_DIRECTORY, dir_fd=here.fd)
            except FileNotFoundError:
                if self._make is None:
                    raise
                try:
                    found = self._make(here, name)
                except FileExistsError:
                    continue
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                try:
                    return os.readlink(name, dir_fd=here.fd)
                except OSError as second:
                    if second.errno == errno.ENOENT:
                        continue
                if self._replace is not None and self._replace(here, name):
                    continue
                raise NotADirectoryThere(f"{show(here.child(name))} is no directory") from None
            else:
                found = Directory(fd, here.child(name))
                self._found(found)
            self.keep(found)
            return found
        raise FormatError(f"{show(here.child(name))} keeps changing")


def remove(fd: int, name: bytes) -> None:
    """Delete a directory with everything below it.

    Directories are moved up before they are emptied, so that neither depth nor the length of paths
    matters and nothing has to stay open. Does not follow links.

    Args:
        fd: the directory that it is in.
        name: of the directory.

    Raises:
        OSError: something cannot be deleted.
    """
    top = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
    try:
        empty(top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=fd)


def empty(top: int) -> None:
    """Delete everything in a directory; see `remove`.

    Args:
        top: the directory, open.
    """
    moved = 0
    prefix = secrets.token_hex(8).encode()
    while directories := _delete_files(top):
        for directory in directories:
            inner = os.open(directory, OPEN_DIRECTORY, dir_fd=top)
            try:
                while deeper := _delete_files(inner):
                    for each in deeper:
                        moved += 1
                        aside = b"%s-%d" % (prefix, moved)
                        os.rename(each, aside, src_dir_fd=inner, dst_dir_fd=top)
            finally:
                os.close(inner)
            os.rmdir(directory, dir_fd=top)


def _delete_files(fd: int) -> list[bytes]:
    """Delete what is no directory; returns the rest, at most a few thousand at a time."""
    directories: list[bytes] = []
    with os.scandir(fd) as listing:
        for entry in listing:
            if entry.is_dir(follow_symlinks=False):
                directories.append(os.fsencode(entry.name))
                if len(directories) >= 4096:
                    break
            else:
                os.unlink(entry.name, dir_fd=fd)
    return directories


def show(name: bytes, limit: int = 200) -> str:
    """A name for a message: printable, and not too long."""
    text = name[:limit].decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return '"' + text + ("..." if len(name) > limit else "") + '"'
