# SPDX-License-Identifier: Apache-2.0
"""Files that are named by the digests of their contents, in two directories of one file system.

A file appears whole under its name, and moves whole from one directory to the other. Knows nothing of
what is right, sealed or held: that is the part of `objects`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import time
from collections.abc import Iterator


class Place(enum.IntEnum):
    """One of the two directories of objects.

    Attributes:
        SHOWN: `objects/`. Overlay has it as a data-only lower layer, so the kernel reads what is in it.
        ASIDE: `aside/`. Only our processes read what is in it.
    """

    SHOWN = 0
    ASIDE = 1


PLACES = (Place.SHOWN, Place.ASIDE)
"""In the order in which they are searched."""


def object_name(key: bytes) -> str:
    """The path of an object below either directory."""
    text = key.hex()
    return f"{text[:2]}/{text}"


class ObjectFiles:
    """Both directories.

    All methods may be called from any thread. A `key` is the 32 bytes of a content's sha256.

    Args:
        shown: the directory `Place.SHOWN`; created with its 256 subdirectories when missing.
        aside: the directory `Place.ASIDE`, on the same file system; likewise.

    Attributes:
        paths: of the directories, by place.
        fds: open directories, by place.
        anonymous: whether the file system has files without a name, as far as is known.
    """

    def __init__(self, shown: str, aside: str) -> None:
        self.paths = (os.path.abspath(shown), os.path.abspath(aside))
        self.fds = (_open_directory(self.paths[0]), _open_directory(self.paths[1]))
        self.anonymous = True

    def close(self) -> None:
        """Release the directories; files that were opened stay usable."""
        for fd in self.fds:
            os.close(fd)

    def path(self, key: bytes, place: Place) -> str:
        """Where a file is, or would be if there were one."""
        return os.path.join(self.paths[place], object_name(key))

    def open(self, key: bytes, place: Place) -> int:
        """Open a file for reading.

        Raises:
            OSError: there is none, or it cannot be opened.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            # Otherwise the kernel would write the access time of each file whose seal is in the future.
            return os.open(object_name(key), flags | os.O_NOATIME, dir_fd=self.fds[place])
        except PermissionError:  # only its owner may do that
            return os.open(object_name(key), flags, dir_fd=self.fds[place])

    def refer(self, key: bytes, place: Place) -> int:
        """Open a file for its status alone (O_PATH): `ObjectWatch` does not report that as an opening.

        Raises:
            OSError: there is none.
        """
        return os.open(object_name(key), os.O_PATH | os.O_CLOEXEC, dir_fd=self.fds[place])

    def status(self, key: bytes, place: Place) -> os.stat_result:
        """The status of a file.

        Raises:
            OSError: there is none.
        """
        return os.stat(object_name(key), dir_fd=self.fds[place])

    def unlink(self, key: bytes, place: Place) -> None:
        """Remove a file, if there is one."""
        with contextlib.suppress(OSError):
            os.unlink(object_name(key), dir_fd=self.fds[place])

    def move(self, key: bytes, *, to: Place) -> None:
        """Move a file to the other directory, if it is not gone."""
        name = object_name(key)
        source = Place.ASIDE if to is Place.SHOWN else Place.SHOWN
        with contextlib.suppress(OSError):
            os.rename(name, name, src_dir_fd=self.fds[source], dst_dir_fd=self.fds[to])

    def write(self, key: bytes, data: bytes | memoryview, place: Place) -> None:
        """Make a file, instead of the one that has its name in the same place.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        fd, temporary = self._create(key)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                if temporary is None:
                    self.link(fd, key, place)
            finally:
                os.close(fd)
            if temporary is not None:
                # Closed before: `ObjectWatch` would take closing for a change.
                self._rename(temporary, key, place)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.fds[Place.ASIDE])
            raise

    def link(self, fd: int, key: bytes, place: Place) -> None:
        """Give an open file a name, instead of the file that has it.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        source = f"/proc/self/fd/{fd}"
        try:
            os.link(source, object_name(key), dst_dir_fd=self.fds[place], follow_symlinks=True)
        except FileExistsError:
            # The file that is there may be wrong, which is why its content is stored now. It is
            # replaced at once: if it is right, nobody must miss it for a moment.
            temporary = _temporary_name(key)
            aside = self.fds[Place.ASIDE]
            os.link(source, temporary, dst_dir_fd=aside, follow_symlinks=True)
            try:
                self._rename(temporary, key, place)
            finally:
                # Still there if both were names of one file, as when another process has adopted it.
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=aside)

    def scan(self, place: Place) -> Iterator[tuple[bytes, os.stat_result]]:
        """All keys of a directory with the status of their files, in no order.

        Files that come or go meanwhile may be left out.

        Raises:
            OSError: a directory cannot be read.
        """
        for number in range(256):
            with os.scandir(os.path.join(self.paths[place], f"{number:02x}")) as entries:
                for entry in entries:
                    with contextlib.suppress(ValueError, OSError):
                        key = bytes.fromhex(entry.name)
                        if len(key) == 32:
                            yield key, entry.stat(follow_symlinks=False)

    def generation(self) -> int:
        """A number that changes with each `note_removal`, of whichever process."""
        return os.fstat(self.fds[Place.SHOWN]).st_mtime_ns

    def note_removal(self) -> None:
        """Begin another generation."""
        now = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(self.fds[Place.SHOWN], ns=(now, now))

    def _create(self, key: bytes) -> tuple[int, str | None]:
        """A new file without a name, or where the file system cannot do that, with a temporary one."""
        aside = self.fds[Place.ASIDE]
        if self.anonymous:
            try:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                # In one directory: file systems keep its inodes together, in the order of time, and
                # what was fetched together will be read together.
                return os.open(".", flags, 0o600, dir_fd=aside), None
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
                self.anonymous = False
        temporary = _temporary_name(key)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        return os.open(temporary, flags, 0o600, dir_fd=aside), temporary

    def _rename(self, temporary: str, key: bytes, place: Place) -> None:
        """Give a temporary file its name."""
        aside = self.fds[Place.ASIDE]
        os.rename(temporary, object_name(key), src_dir_fd=aside, dst_dir_fd=self.fds[place])


def _open_directory(path: str) -> int:
    os.makedirs(path, mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for number in range(256):
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{number:02x}", 0o700, dir_fd=fd)
    return fd


def _temporary_name(key: bytes) -> str:
    return f"{key[:1].hex()}/new-{os.getpid()}-{os.urandom(8).hex()}"
