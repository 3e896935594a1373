# SPDX-License-Identifier: Apache-2.0
"""Complete file contents on disk, shared by all layers and processes.

An object is a content that was verified before it was stored, and appears whole. `object_states` tells in
which states an object can be, and has the table of what the verbs below make of each; `object_files` does
what they need on the disk. Knows nothing of chunks or layers.

Invariant: `open` never returns an object whose bytes have not been checked against its digest, either
by this process since it started or before the object was sealed. Nothing that is DISTRUSTED is shown.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator

from lazysnap import log
from lazysnap.cache import stamps
from lazysnap.cache.object_files import PLACES, ObjectFiles, Place, object_name
from lazysnap.cache.object_states import State, state_of
from lazysnap.errors import Internal

_log = log.get(__name__)
_READ_SIZE = 1 << 20
_ZEROS = memoryview(bytes(_READ_SIZE))
# A file of more bytes would push out of memory what others read from there.
_LARGE = 1 << 30
# A file's time stamp comes from a clock that ticks, at HZ=100 every 10 ms.
_TICK_SECONDS = 0.02


class ObjectStore:
    """The directories of complete contents.

    All methods may be called from any thread. A `key` is the 32 bytes of a content's sha256.

    Args:
        root: the directory that the kernel reads; created with its 256 subdirectories when missing.
        aside: the other one, on the same file system; likewise.

    Attributes:
        hold_above: hold new objects of more bytes than this; None when nothing is held.
    """

    def __init__(self, root: str, aside: str) -> None:
        self._files = ObjectFiles(root, aside)
        self.root, self.aside = self._files.paths
        self.hold_above: int | None = None
        # Verified by this process and not sealed yet.
        self._verified: set[bytes] = set()
        # Aside, and to be shown by `release` unless they are distrusted.
        self._held: set[bytes] = set()

    def close(self) -> None:
        """Release the directories; objects that were opened stay usable."""
        self._files.close()

    name = staticmethod(object_name)

    def path(self, key: bytes) -> str:
        """Where an object is, or would be if there were one."""
        aside = self._files.path(key, Place.ASIDE)
        return aside if os.path.exists(aside) else self._files.path(key, Place.SHOWN)

    def state(self, key: bytes) -> State:
        """The state of an object in the eyes of this process; reads none of its bytes."""
        for place in PLACES:
            try:
                modified = self._files.status(key, place).st_mtime_ns
            except OSError:
                continue
            sealed = modified == stamps.seal_time(key)
            verified, held = key in self._verified, key in self._held
            return state_of(place, sealed=sealed, verified=verified, held=held)
        return State.ABSENT

    def open(self, key: bytes, size: int) -> int | None:
        """Open an object that is known to be right without reading it.

        Args:
            key: the content's sha256.
            size: its length in bytes.

        Returns:
            A file descriptor that the caller closes; None when there is no such object, or one that
            `verify` has to look at first.
        """
        for place in PLACES:
            try:
                fd = self._files.open(key, place)
            except OSError:
                continue
            status = os.fstat(fd)
            sealed = status.st_mtime_ns == stamps.seal_time(key)
            if status.st_size == size and (sealed or key in self._verified):
                stamps.touch(fd, status)
                if sealed and place is Place.ASIDE:
                    self._held.add(key)  # it may have been on probation
                return fd
            os.close(fd)
        return None

    def exists(self, key: bytes, size: int) -> bool:
        """Whether there is an object of this name and size, right or not.

        One of another size is either cut off, or right and the size a false claim: neither is worth
        a look at its bytes.
        """
        name = object_name(key)
        for directory in self._files.fds:
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
        for place in PLACES:
            try:
                fd = self._files.open(key, place)
            except OSError:
                continue
            try:
                if _sha256(fd) == key:
                    self._verified.add(key)
                    if place is Place.ASIDE:
                        self._held.add(key)
                    return True
            except OSError as error:
                _log.warning("cached object cannot be read", digest=key.hex(), error=error)
            finally:
                os.close(fd)
            found = True
            self._files.unlink(key, place)
        if found:
            _log.warning("cached object is wrong, removed", digest=key.hex())
            self.remove(key)
        return False

    def remove(self, key: bytes) -> None:
        """Remove an object; those who have it open can go on reading it."""
        self._verified.discard(key)
        self._held.discard(key)
        for place in PLACES:
            self._files.unlink(key, place)
        self.note_removal()

    def generation(self) -> int:
        """A number that changes when something was removed, by whichever process.

        Whatever was found to be complete has to be looked at again when the number is another one.
        """
        return self._files.generation()

    def note_removal(self) -> None:
        """Begin another generation."""
        self._files.note_removal()

    def put(self, key: bytes, data: bytes | memoryview) -> None:
        """Store a content that the caller has verified against `key`.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        place = self._place(len(data))
        self._files.write(key, data, place)
        self._stored(key, place)

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
            place = self._place(os.fstat(fd).st_size)
            # Not renamed: since it was read, another file can have got its name.
            self._files.link(fd, key, place)
        finally:
            os.close(fd)
        self._stored(key, place)
        with contextlib.suppress(OSError):
            os.unlink(path)
        return True

    def _place(self, size: int) -> Place:
        """Where a new object of so many bytes belongs."""
        return Place.SHOWN if self.hold_above is None or size <= self.hold_above else Place.ASIDE

    def _stored(self, key: bytes, place: Place) -> None:
        """Note that an object was stored; not before, as its name may have stood for a wrong one."""
        # What is in the other place may be wrong: it would count, or come back by another process.
        if place is Place.ASIDE:
            self._files.unlink(key, Place.SHOWN)
            self._held.add(key)
        else:
            self._files.unlink(key, Place.ASIDE)
            self._held.discard(key)
        self._verified.add(key)

    def seal(self) -> int:
        """Sync, then seal all that was stored since the last call; show what need not be held.

        Returns:
            How many objects were sealed.

        Raises:
            Internal: the disk did not take all that was written; nothing is sealed.
        """
        sealed = 0
        if verified := list(self._verified):
            before = time.time_ns()
            time.sleep(_TICK_SECONDS)
            try:
                stamps.sync_filesystem(self._files.fds[Place.SHOWN])
            except OSError as error:
                raise Internal(f"syncing the cache failed: {error}") from error
            for key in verified:
                if self._seal(key, before):
                    self._verified.discard(key)
                    sealed += 1
        self.release()
        return sealed

    def _seal(self, key: bytes, before: int) -> bool:
        """Seal one object, unless it was written after `before` and may not have been synced."""
        for place in PLACES:
            try:
                fd = self._files.refer(key, place)
            except OSError:
                continue
            try:
                status = os.fstat(fd)
                # Another process can have replaced it by one as right, but not on the disk yet.
                if status.st_mtime_ns != stamps.seal_time(key):
                    if status.st_mtime_ns > before:
                        return False
                    with contextlib.suppress(OSError):
                        stamps.seal(fd, key)
                    if key not in self._verified:  # distrusted meanwhile
                        _break_seal(fd)
                        return False
            finally:
                os.close(fd)
            if place is Place.SHOWN:
                self._merge(key, status.st_ino)
            else:
                self._held.add(key)  # `recover` of another process did not know of us
            return True
        return True

    def _merge(self, key: bytes, inode: int) -> None:
        """Have only one file of an object that is shown; it was stored anew if there is another."""
        try:
            status = self._files.status(key, Place.ASIDE)
        except OSError:
            return
        if status.st_ino == inode:
            self._held.add(key)  # it was put aside just now
        else:
            self._files.unlink(key, Place.ASIDE)

    def release(self) -> None:
        """Show what was held, unless objects are still to be held."""
        while self._held and self.hold_above is None:
            try:
                key = self._held.pop()
                modified = self._files.status(key, Place.ASIDE).st_mtime_ns
            except (KeyError, OSError):  # another thread, or another process, was faster
                continue
            if key in self._verified or modified == stamps.seal_time(key):
                self._files.move(key, to=Place.SHOWN)

    def hold(self, key: bytes) -> None:
        """Take an object out of the kernel's sight until `release` is called when nothing is held."""
        self._files.move(key, to=Place.ASIDE)
        self._held.add(key)

    def put_on_probation(self, key: bytes) -> None:
        """Take an object out of the kernel's sight until it is opened here."""
        self._files.move(key, to=Place.ASIDE)
        if key in self._verified:
            self._held.add(key)

    def distrust(self, key: bytes) -> None:
        """Have an object verified before its next use, and out of the kernel's sight until then."""
        self._verified.discard(key)
        for place in PLACES:
            try:
                fd = self._files.refer(key, place)
            except OSError:
                continue
            try:
                _break_seal(fd)
            finally:
                os.close(fd)
        self._put_aside(key)

    def distrust_new(self) -> None:
        """New objects may have been changed: have those verified that the kernel sees."""
        for key in list(self._verified):
            if os.path.exists(self._files.path(key, Place.SHOWN)):
                self.distrust(key)

    def _put_aside(self, key: bytes) -> None:
        """Take an object without a seal out of the kernel's sight until it was verified."""
        self._verified.discard(key)
        self._held.discard(key)
        if os.path.exists(self._files.path(key, Place.ASIDE)):
            self._files.unlink(key, Place.SHOWN)  # not over that one, which may be right
        else:
            self._files.move(key, to=Place.ASIDE)
        self.note_removal()

    def recover(self) -> tuple[int, int]:
        """Put in order what earlier processes left, and what was done to it since.

        Afterwards only what was sealed is shown, and what processes that run now have stored.

        Returns:
            How many sealed objects were shown again, and how many without a seal were put aside.
        """
        shown = distrusted = 0
        for key, status in self._files.scan(Place.ASIDE):
            if status.st_mtime_ns == stamps.seal_time(key) and key not in self._held:
                self._files.move(key, to=Place.SHOWN)
                shown += 1
        for key, status in self._files.scan(Place.SHOWN):
            if status.st_mtime_ns != stamps.seal_time(key) and key not in self._verified:
                self._put_aside(key)
                distrusted += 1
        if distrusted:
            _log.info("cached objects are not sealed, they are verified again", objects=distrusted)
        return shown, distrusted

    def __iter__(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """All objects with their status; not those that come or go meanwhile."""
        for place in PLACES:
            yield from self._files.scan(place)


def _break_seal(fd: int) -> None:
    try:
        stamps.break_seal(fd)
    except OSError as error:
        _log.warning("seal not broken", error=error)


def _sha256(fd: int) -> bytes:
    hasher = hashlib.sha256()
    size = os.fstat(fd).st_size
    offset = 0
    hole_end = size if size <= _READ_SIZE else 0
    while offset < size:
        # The kernel would fill the page cache with the zeros of holes, so these are not read.
        if offset >= hole_end:
            data_from, hole_end = _next_data(fd, offset, size)
            for at in range(offset, data_from, _READ_SIZE):
                hasher.update(_ZEROS[: min(_READ_SIZE, data_from - at)])
            offset = data_from
        data = os.pread(fd, min(_READ_SIZE, hole_end - offset) or _READ_SIZE, offset)
        if not data:
            break
        hasher.update(data)
        if size > _LARGE:
            os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)
        offset += len(data)
    return hasher.digest()


def _next_data(fd: int, offset: int, size: int) -> tuple[int, int]:
    """Where in a file the next data begins, and the hole behind it; both its size if there are none."""
    try:
        data_from = os.lseek(fd, offset, os.SEEK_DATA)
        return data_from, os.lseek(fd, data_from, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        return offset, size  # a file system that does not tell
