# SPDX-License-Identifier: Apache-2.0
"""Complete file contents on disk, shared by all layers and processes.

A content is verified before it is stored, and appears whole, as `objects/<aa>/<digest>`. There the kernel
reads it without asking anybody: overlay has that directory as a data-only lower layer. Storing does not
sync, as that would cost more than the download. Some seconds later, after one sync of the file system
for all that is new, an object is *sealed* (see `stamps`). What is not sealed is verified again before it
is used by a process that has not stored it, and when the machine may have lost power since, it is put
*aside* before the kernel gets to see it: in `aside/<aa>/<digest>` are contents that only we read. So is
what was changed, and for a time what the kernel shall not read because that would not be noticed. Knows
nothing of chunks or layers.

Invariant: `open` never returns an object whose bytes have not been checked against its digest, either
by this process since it started or before the object was sealed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping

from lazysnap import log
from lazysnap.cache import stamps
from lazysnap.errors import Internal

_log = log.get(__name__)
_READ_SIZE = 1 << 20
# A file's time stamp comes from a clock that ticks, at HZ=100 every 10 ms.
_TICK_SECONDS = 0.02


class ObjectStore:
    """The directories of complete contents.

    All methods may be called from any thread. A `key` is the 32 bytes of a content's sha256.

    Args:
        root: the directory that the kernel reads; created with its 256 subdirectories when missing.
        aside: the other one, on the same file system; likewise.

    Attributes:
        hold_above: put new objects of more bytes than this aside, until `release` or `seal` is called
            when this is infinite.
    """

    def __init__(self, root: str, aside: str) -> None:
        self.root = os.path.abspath(root)
        self.aside = os.path.abspath(aside)
        self.hold_above = math.inf
        self._objects = _open_directory(self.root)
        self._others = _open_directory(self.aside)
        # Verified by this process and not sealed yet.
        self._unsealed: set[bytes] = set()
        # Aside, and to be moved to the objects by `seal`.
        self._held: set[bytes] = set()
        self._anonymous = True

    def close(self) -> None:
        """Release the directories; objects that were opened stay usable."""
        os.close(self._objects)
        os.close(self._others)

    @staticmethod
    def name(key: bytes) -> str:
        """The path of an object below either directory."""
        text = key.hex()
        return f"{text[:2]}/{text}"

    def path(self, key: bytes) -> str:
        """Where an object is, or would be if there were one."""
        aside = os.path.join(self.aside, self.name(key))
        return aside if os.path.exists(aside) else os.path.join(self.root, self.name(key))

    def open(self, key: bytes, size: int) -> int | None:
        """Open an object that is known to be right without reading it.

        Args:
            key: the content's sha256.
            size: its length in bytes.

        Returns:
            A file descriptor that the caller closes; None when there is no such object, or one that
            `verify` has to look at first.
        """
        for directory in (self._objects, self._others):
            try:
                fd = self._open(key, directory)
            except OSError:
                continue
            status = os.fstat(fd)
            sealed = status.st_mtime_ns == stamps.seal_time(key)
            if status.st_size == size and (sealed or key in self._unsealed):
                stamps.touch(fd, status)
                if sealed and directory == self._others:
                    self._held.add(key)  # it may have been on probation
                return fd
            os.close(fd)
        return None

    def exists(self, key: bytes, size: int) -> bool:
        """Whether there is an object of this name and size, right or not.

        One of another size is either cut off, or right and the size a false claim: neither is worth
        a look at its bytes.
        """
        name = self.name(key)
        for directory in (self._objects, self._others):
            try:
                if os.stat(name, dir_fd=directory).st_size == size:
                    return True
            except OSError:  # most do not exist, and contextlib takes longer than the look
                continue
        return False

    def verify(self, key: bytes) -> bool:
        """Read an object and check it; a wrong one is removed with a warning.

        Returns:
            True when `open` will now return it. False when there is none (any more).
        """
        found = False
        for directory in (self._objects, self._others):
            try:
                fd = self._open(key, directory)
            except OSError:
                continue
            try:
                if _sha256(fd) == key:
                    self._unsealed.add(key)
                    return True
            except OSError as error:
                _log.warning("cached object cannot be read", digest=key.hex(), error=error)
            finally:
                os.close(fd)
            found = True
            with contextlib.suppress(OSError):
                os.unlink(self.name(key), dir_fd=directory)
        if found:
            _log.warning("cached object is wrong, removed", digest=key.hex())
            self.remove(key)
        return False

    def remove(self, key: bytes) -> None:
        """Remove an object; those who have it open can go on reading it."""
        self._unsealed.discard(key)
        self._held.discard(key)
        for directory in (self._objects, self._others):
            with contextlib.suppress(OSError):
                os.unlink(self.name(key), dir_fd=directory)
        self.note_removal()

    def generation(self) -> int:
        """A number that changes when something was removed, by whichever process.

        What was found to be complete is to be looked at again when this is another number.
        """
        return os.fstat(self._objects).st_mtime_ns

    def note_removal(self) -> None:
        """Begin another generation."""
        now = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(self._objects, ns=(now, now))

    def put(self, key: bytes, data: bytes | memoryview) -> None:
        """Store a content that the caller has verified against `key`.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        fd, temporary = self._create(self.name(key))
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                if temporary is None:
                    self._publish(fd, key)
            finally:
                os.close(fd)
            if temporary is not None:
                # Closed before: whoever watches the objects would take closing for a change.
                os.rename(temporary, self.name(key), **self._ways(self._place(len(data))))
                self._note(key, len(data))
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._others)
            raise

    def adopt(self, path: str, key: bytes) -> bool:
        """Make the file `path` an object, if its content is the one that `key` says.

        Args:
            path: a complete file on the same file system; its name is gone afterwards if it was right.
            key: the sha256 that it must have.

        Returns:
            Whether it was right.

        Raises:
            OSError: the file cannot be read or renamed.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _sha256(fd) != key:
                return False
            # Not renamed: since it was read, another file can have got its name.
            self._publish(fd, key)
        finally:
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        return True

    def seal(self) -> int:
        """Sync, then seal all that was stored since the last call; move what is not to be held.

        Returns:
            How many objects were sealed.

        Raises:
            Internal: the disk did not take all that was written; nothing is sealed.
        """
        sealed = 0
        if unsealed := list(self._unsealed):
            before = time.time_ns()
            time.sleep(_TICK_SECONDS)
            try:
                stamps.sync_filesystem(self._objects)
            except OSError as error:
                raise Internal(f"syncing the cache failed: {error}") from error
            for key in unsealed:
                if self._seal(key, before):
                    self._unsealed.discard(key)
                    sealed += 1
        self.release()
        return sealed

    def release(self) -> None:
        """Move what was held to the objects, unless more is to be held."""
        while self._held and self.hold_above == math.inf:
            with contextlib.suppress(KeyError):  # another thread was faster
                self._move(self._held.pop(), to=self._objects)

    def _seal(self, key: bytes, before: int) -> bool:
        """Mark one object, unless it was written after `before` and may not have been synced."""
        for directory in (self._objects, self._others):
            try:
                # That is no opening, for whoever watches the objects.
                fd = os.open(self.name(key), os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
            except OSError:
                continue
            try:
                # Another process can have replaced it by one as right, but not on the disk yet.
                modified = os.fstat(fd).st_mtime_ns
                if modified != stamps.seal_time(key):
                    if modified > before:
                        return False
                    with contextlib.suppress(OSError):
                        stamps.seal(fd, key)
            finally:
                os.close(fd)
            if directory == self._others:
                self._held.add(key)  # `recover` of another process did not know of us
        return True

    def _move(self, key: bytes, *, to: int) -> None:
        """Move an object to the other directory; moved by another process or removed, it is gone."""
        source = self._others if to == self._objects else self._objects
        name = self.name(key)
        with contextlib.suppress(OSError):
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=to)

    def demote(self, key: bytes) -> None:
        """Have an object verified before its next use, and out of the kernel's sight until then."""
        self._unsealed.discard(key)
        if os.path.exists(os.path.join(self.aside, self.name(key))):
            # Not over that one, which may be right.
            with contextlib.suppress(OSError):
                os.unlink(self.name(key), dir_fd=self._objects)
        else:
            self._move(key, to=self._others)
        self.note_removal()

    def distrust(self) -> None:
        """New objects may have been changed: have those verified that the kernel sees."""
        for key in list(self._unsealed):
            if os.path.exists(os.path.join(self.root, self.name(key))):
                self.demote(key)

    def withdraw(self, key: bytes) -> None:
        """Take an object out of the kernel's sight until `seal` is called when nothing is held."""
        self.put_on_probation(key)
        self._held.add(key)

    def put_on_probation(self, key: bytes) -> None:
        """Take an object out of the kernel's sight until it is opened here."""
        self._move(key, to=self._others)

    def recover(self) -> tuple[int, int]:
        """Put in order what earlier processes left, and what was done to it since.

        Afterwards the kernel sees only what was sealed, and what processes that run now have stored.

        Returns:
            How many sealed objects were moved to the objects, and how many that are not sealed aside.
        """
        settled = demoted = 0
        for key, status in _scan(self.aside):
            if status.st_mtime_ns == stamps.seal_time(key) and key not in self._held:
                self._move(key, to=self._objects)
                settled += 1
        for key, status in _scan(self.root):
            if status.st_mtime_ns != stamps.seal_time(key) and key not in self._unsealed:
                self.demote(key)
                demoted += 1
        if demoted:
            _log.info("cached objects are not sealed, they are verified again", objects=demoted)
        return settled, demoted

    def _open(self, key: bytes, directory: int) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            # Else the kernel would write the access time of whatever has a seal in the future.
            return os.open(self.name(key), flags | os.O_NOATIME, dir_fd=directory)
        except PermissionError:  # only its owner may do that
            return os.open(self.name(key), flags, dir_fd=directory)

    def __iter__(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """All objects with their status; not those that come or go meanwhile."""
        yield from _scan(self.root)
        yield from _scan(self.aside)

    def _create(self, name: str) -> tuple[int, str | None]:
        """A new file that has no name yet, or where the file system cannot do that, a temporary one."""
        if self._anonymous:
            try:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                # In one directory: file systems keep its inodes together, in the order of time, and
                # what was fetched together will be read together.
                return os.open(".", flags, 0o600, dir_fd=self._others), None
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
                self._anonymous = False
        temporary = _temporary_name(name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        return os.open(temporary, flags, 0o600, dir_fd=self._others), temporary

    def _place(self, size: int) -> int:
        return self._others if size > self.hold_above else self._objects

    def _note(self, key: bytes, size: int) -> None:
        """An object was stored; not before, as its name may have stood for a wrong one."""
        self._unsealed.add(key)
        if size > self.hold_above:
            self._held.add(key)

    def _ways(self, place: int) -> Mapping[str, int]:
        return {"src_dir_fd": self._others, "dst_dir_fd": place}

    def _publish(self, fd: int, key: bytes) -> None:
        """Give an open file the name of an object."""
        size = os.fstat(fd).st_size
        name, place = self.name(key), self._place(size)
        source = f"/proc/self/fd/{fd}"
        try:
            os.link(source, name, dst_dir_fd=place, follow_symlinks=True)
        except FileExistsError:
            # What is there may be wrong, which is why its content is being stored now. It is replaced
            # at once: if it is right, nobody shall miss it for a moment.
            temporary = _temporary_name(name)
            os.link(source, temporary, dst_dir_fd=self._others, follow_symlinks=True)
            try:
                os.rename(temporary, name, **self._ways(place))
            finally:
                # Still there if both were names of one file, as when another process has adopted it.
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._others)
        self._note(key, size)


def _open_directory(path: str) -> int:
    os.makedirs(path, mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for number in range(256):
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{number:02x}", 0o700, dir_fd=fd)
    return fd


def _scan(directory: str) -> Iterator[tuple[bytes, os.stat_result]]:
    for number in range(256):
        with os.scandir(os.path.join(directory, f"{number:02x}")) as entries:
            for entry in entries:
                with contextlib.suppress(ValueError, OSError):
                    key = bytes.fromhex(entry.name)
                    if len(key) == 32:
                        yield key, entry.stat(follow_symlinks=False)


def _temporary_name(name: str) -> str:
    return f"{name[:2]}/new-{os.getpid()}-{os.urandom(8).hex()}"


def _sha256(fd: int) -> bytes:
    hasher = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, _READ_SIZE, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.digest()
