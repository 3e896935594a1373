# SPDX-License-Identifier: Apache-2.0
"""Complete file contents on disk, `objects/<aa>/<digest>`, shared by all layers and processes.

A content is verified before it is stored, and appears under its name at once and whole. Storing does
not sync, as that would cost more than the download; instead an object is *sealed* some seconds later,
after one sync of the file system for all new objects: its modification time is set to a value that is
computed from its digest. An object that is not sealed (the machine lost power before, or somebody
wrote to it) is verified again before it is used. Its access time says when it was last opened, to the
hour. Knows nothing of chunks or layers.

Invariant: `open` never returns an object whose bytes have not been checked against its digest, either
by this process since it started or before the object was sealed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import time
from collections.abc import Iterator

from lazysnap import log
from lazysnap.errors import Internal

_log = log.get(__name__)
_READ_SIZE = 1 << 20
_NANOSECONDS = 1_000_000_000
_libc = ctypes.CDLL(None, use_errno=True)
# Opening marks an object as used at most this often, so that reads cost no writes.
_TOUCH_NANOSECONDS = 3600 * _NANOSECONDS
# A file's time stamp comes from a clock that ticks, at HZ=100 every 10 ms.
_TICK_SECONDS = 0.02
# From utimensat(2); `os.utime` cannot leave one of the two times alone.
_NOW = (1 << 30) - 1
_OMIT = (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _set_times(fd: int, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    """futimens(2); each time is seconds and nanoseconds, the latter may be `_NOW` or `_OMIT`."""
    times = (_Timespec * 2)(_Timespec(*accessed), _Timespec(*modified))
    if _libc.futimens(fd, times) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "futimens")


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
    return seconds * _NANOSECONDS + int.from_bytes(key[4:8], "big") % _NANOSECONDS


def sync_filesystem(fd: int) -> None:
    """Write all that is dirty in the file system of `fd` to its disk (syncfs(2)).

    Raises:
        OSError: the disk refused some of it.
    """
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "syncfs")


class ObjectStore:
    """The directory of complete contents.

    All methods may be called from any thread. A `key` is the 32 bytes of a content's sha256.

    Args:
        root: the directory; created with its 256 subdirectories when missing.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        self._directory = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for number in range(256):
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{number:02x}", 0o700, dir_fd=self._directory)
        # Verified by this process and not sealed yet.
        self._fresh: set[bytes] = set()
        self._anonymous = True

    def close(self) -> None:
        """Release the directory; objects that were opened stay usable."""
        os.close(self._directory)

    @staticmethod
    def name(key: bytes) -> str:
        """The path of an object below the root."""
        text = key.hex()
        return f"{text[:2]}/{text}"

    def open(self, key: bytes, size: int) -> int | None:
        """Open an object that is known to be right without reading it.

        Args:
            key: the content's sha256.
            size: its length in bytes.

        Returns:
            A file descriptor that the caller closes; None when there is no such object, or one that
            `verify` has to look at first.
        """
        try:
            fd = self._open(key)
        except OSError:
            return None
        stat = os.fstat(fd)
        if stat.st_size == size and (stat.st_mtime_ns == seal_time(key) or key in self._fresh):
            touch(fd, stat)
            return fd
        os.close(fd)
        return None

    def exists(self, key: bytes, size: int) -> bool:
        """Whether there is an object of this name and size, right or not.

        One of another size is either cut off, or right and the size a false claim: neither is worth
        a look at its bytes.
        """
        try:
            return os.stat(self.name(key), dir_fd=self._directory).st_size == size
        except OSError:
            return False

    def verify(self, key: bytes) -> bool:
        """Read an object and check it; a wrong one is removed with a warning.

        Returns:
            True when `open` will now return it. False when there is none (any more).
        """
        try:
            fd = self._open(key)
        except OSError:
            return False
        try:
            if _sha256(fd) == key:
                self._fresh.add(key)
                return True
        except OSError as error:
            _log.warning("cached object cannot be read", digest=key.hex(), error=error)
        finally:
            os.close(fd)
        _log.warning("cached object is wrong, removed", digest=key.hex())
        self.remove(key)
        return False

    def remove(self, key: bytes) -> None:
        """Remove an object; those who have it open can go on reading it."""
        self._fresh.discard(key)
        with contextlib.suppress(OSError):
            os.unlink(self.name(key), dir_fd=self._directory)
        self.note_removal()

    def generation(self) -> int:
        """A number that changes when something was removed, by whichever process.

        What was found to be complete is to be looked at again when this is another number.
        """
        return os.fstat(self._directory).st_mtime_ns

    def note_removal(self) -> None:
        """Begin another generation."""
        now = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(self._directory, ns=(now, now))

    def put(self, key: bytes, data: bytes | memoryview) -> None:
        """Store a content that the caller has verified against `key`.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        name = self.name(key)
        fd, temporary = self._create(name)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            self._publish(fd, temporary, name)
            # Not before: until now the name may have stood for a wrong object.
            self._fresh.add(key)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._directory)
            raise
        finally:
            os.close(fd)

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
            self._publish(fd, None, self.name(key))
            self._fresh.add(key)
        finally:
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        return True

    def seal(self) -> int:
        """Sync, then mark all that was stored since the last call as sealed.

        Returns:
            How many objects were sealed.

        Raises:
            Internal: the disk did not take all that was written; nothing is sealed.
        """
        fresh = list(self._fresh)
        if not fresh:
            return 0
        before = time.time_ns()
        time.sleep(_TICK_SECONDS)
        try:
            sync_filesystem(self._directory)
        except OSError as error:
            raise Internal(f"syncing the cache failed: {error}") from error
        sealed = 0
        for key in fresh:
            with contextlib.suppress(OSError):
                if not self._seal(key, before):
                    continue
                sealed += 1
            self._fresh.discard(key)
        return sealed

    def _seal(self, key: bytes, before: int) -> bool:
        """Mark one object, unless it was written after `before` and may not have been synced."""
        fd = self._open(key)
        try:
            # Another process can have replaced it by one that is as right, but not on the disk yet.
            modified = os.fstat(fd).st_mtime_ns
            if modified == seal_time(key):
                return True
            if modified > before:
                return False
            _set_times(fd, (0, _OMIT), divmod(seal_time(key), _NANOSECONDS))
        finally:
            os.close(fd)
        return True

    def _open(self, key: bytes) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            # Else the kernel would write the access time of whatever has a seal in the future.
            return os.open(self.name(key), flags | os.O_NOATIME, dir_fd=self._directory)
        except PermissionError:  # only its owner may do that
            return os.open(self.name(key), flags, dir_fd=self._directory)

    def __iter__(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """All objects with their status; not those that come or go meanwhile."""
        for number in range(256):
            with os.scandir(os.path.join(self.root, f"{number:02x}")) as entries:
                for entry in entries:
                    with contextlib.suppress(ValueError, OSError):
                        key = bytes.fromhex(entry.name)
                        if len(key) == 32:
                            yield key, entry.stat(follow_symlinks=False)

    def _create(self, name: str) -> tuple[int, str | None]:
        """A new file that has no name yet, or where the file system cannot do that, a temporary one."""
        if self._anonymous:
            try:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                return os.open(name[:2], flags, 0o600, dir_fd=self._directory), None
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
                self._anonymous = False
        temporary = _temporary_name(name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        return os.open(temporary, flags, 0o600, dir_fd=self._directory), temporary

    def _publish(self, fd: int, temporary: str | None, name: str) -> None:
        if temporary is not None:
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            return
        source = f"/proc/self/fd/{fd}"
        try:
            os.link(source, name, dst_dir_fd=self._directory, follow_symlinks=True)
            return
        except FileExistsError:
            pass
        # What is there may be wrong, which is why its content is being stored now. It is replaced at
        # once: if it is right, nobody shall miss it for a moment.
        temporary = _temporary_name(name)
        os.link(source, temporary, dst_dir_fd=self._directory, follow_symlinks=True)
        try:
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        finally:
            # Still there if both were names of one file, as when another process has just adopted it.
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)


def _temporary_name(name: str) -> str:
    return f"{name[:2]}/new-{os.getpid()}-{os.urandom(8).hex()}"


def _sha256(fd: int) -> bytes:
    hasher = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, _READ_SIZE, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.digest()
