# SPDX-License-Identifier: Apache-2.0
"""Keeps the cache within its limits: removes what was not used for the longest time.

Contents of files go, and layer files (see `inventory`) that no slot needs. What slots need stays, and
counts for half of the limit at most: otherwise layers that are nearly all tree would evict all contents.

There are two limits: what the cache may take, and what must stay free on its file system (bytes, and
inodes). Looking whether one is reached costs a statvfs and, with a size limit, a few bytes of the file
`usage`, in which all processes add up what they stored; the directories are read only when something
has to go. At most one process of a cache evicts at a time: it holds a lock (flock) on the directory.

Removing never breaks a reader: those who have a file open go on reading it, and its blocks are free
when the last of them closes it (see `OpenFiles.sweep`). All methods may be called from any thread.

The kernel reads objects by itself, so of these only the first use is known. Therefore, whenever something
goes, the objects that would go next are put on probation (see `object_states`): whoever uses one has to
ask for it, and the next time only those go that nobody has asked for.

Invariant: what goes was used before what stays, to the hour, as far as uses are known.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import chain

from lazysnap import log
from lazysnap.cache import Cache
from lazysnap.cache.inventory import Entry, Kind, entries, layer_files, remove
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts

_log = log.get(__name__)
_BLOCK = 4096
_LOOK_AFTER_BYTES = 128 << 20
# With a size limit, after so much of it, if that is less.
_LOOK_AFTER_SHARE = 20
# The reserve is never more than a quarter of a file system: on a small one it would forbid all use.
_RESERVE_SHARE = 4
# When something must go, a tenth more goes, so that the directories are not read again at once.
_SLACK = 10
# Of all inodes, this share is kept free, and twice as many are when some must go.
_INODE_SHARE = 100
# Counting anew finds what processes added before they were killed, and what was removed by hand.
_COUNT_AGAIN_SECONDS = 6 * 3600
_ROOM_BYTES = 64 << 20
_ROOM_INODES = 256
_LOCK_SECONDS = 2.0
# Nobody waits longer between the opening of an index, which is noted to the hour, and the record of the
# slot that needs it.
_IN_THE_MAKING_NANOSECONDS = 2 * 3600 * 10**9
_LAYERS_SHARE = 2
# After an eviction that found nothing, stores that fail do not make us look again for so long.
_HOPELESS_SECONDS = 5.0


InUse = Callable[[], Container[str] | None]
"""Tells the names of the layer files that slots need; None if that is not known."""


@dataclass(frozen=True)
class CacheLimits:
    """How much of the disk the cache may use.

    Attributes:
        size_limit_bytes: what its contents may take; 0 for no limit.
        reserve_bytes: what stays free on its file system, at least.
        reserve_percent: likewise, in percent of the file system; the greater of both counts.
    """

    size_limit_bytes: int = 0
    reserve_bytes: int = 1 << 30
    reserve_percent: float = 5.0

    def reserve(self, status: os.statvfs_result) -> int:
        """The bytes of a file system that must stay free."""
        size = status.f_blocks * status.f_frsize
        wanted = max(self.reserve_bytes, int(size * self.reserve_percent / 100))
        return min(wanted, size // _RESERVE_SHARE)


@dataclass(frozen=True, slots=True)
class Shortage:
    """How much has to go.

    Attributes:
        disk_bytes: at least so many bytes on disk.
        inodes: at least so many files.
    """

    disk_bytes: int = 0
    inodes: int = 0

    def __bool__(self) -> bool:
        return self.disk_bytes > 0 or self.inodes > 0

    def doubled(self) -> Shortage:
        """Twice as much."""
        return Shortage(2 * self.disk_bytes, 2 * self.inodes)

    def met_by(self, disk_bytes: int, inodes: int) -> bool:
        """Whether removing so much is enough."""
        return disk_bytes >= self.disk_bytes and inodes >= self.inodes


@contextlib.contextmanager
def exclusive(cache: Cache, seconds: float) -> Iterator[bool]:
    """Hold the lock of those who remove many things from a cache.

    Args:
        cache: whose lock.
        seconds: how long to wait for it.

    Yields:
        Whether it was had.

    Raises:
        OSError: the directory cannot be opened.
    """
    fd = os.open(cache.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    yield False
                    return
                time.sleep(0.01)  # flock has no timeout
                continue
            yield True
            return
    finally:
        os.close(fd)


class Evictor:
    """Looks after the limits of a cache, for one process.

    Args:
        cache: what to look after.
        limits: what to keep to.
        in_use: the layer files that stay; by default all.
    """

    def __init__(self, cache: Cache, limits: CacheLimits, in_use: InUse = lambda: None) -> None:
        self.cache = cache
        self._in_use = in_use
        self._layers: tuple[tuple[int, int], int] = (0, 0), 0
        self.apply(limits)
        self._usage = cache.paths.usage
        self._last = cache.paths.evicted
        self._lock = threading.Lock()
        self._pending = 0
        self._hopeless_until = float("-inf")

    def apply(self, limits: CacheLimits) -> None:
        """Keep to other limits from now on."""
        self.limits = limits
        self._look_after = _LOOK_AFTER_BYTES
        if limits.size_limit_bytes:
            share = limits.size_limit_bytes // _LOOK_AFTER_SHARE
            self._look_after = min(self._look_after, share)

    def stored(self, size: int) -> None:
        """Note that something was stored; looks at the limits when it has become much.

        Args:
            size: of what was stored, in bytes.
        """
        with self._lock:
            self._pending += -(-size // _BLOCK) * _BLOCK
            enough = self._pending >= self._look_after
            if enough and not self.limits.size_limit_bytes:
                self._pending = 0
        if enough:
            self.look()

    def look(self) -> int:
        """See whether a limit is reached, and if so, evict.

        Returns:
            How many bytes went; 0 also when another process is at it.
        """
        try:
            if not self.limits.size_limit_bytes and not self._reserve_shortage():
                return 0
            with exclusive(self.cache, 0) as alone:
                return self._evict(self._shortage) if alone else 0
        except OSError as error:
            # Storing will tell the operator what is wrong with the disk.
            _log.debug("cache cannot be looked after", error=error)
            return 0

    def seconds_since_eviction(self) -> float:
        """How long ago a process has evicted something; infinite if that is not known."""
        try:
            # A clock that was set back must not make one that was long ago a recent one for years.
            return abs(time.time() - os.stat(self._last).st_mtime)
        except OSError:
            return float("inf")

    def make_room(self, size: int) -> bool:
        """The disk has refused to take something: evict at once.

        Args:
            size: of what was refused, in bytes.

        Returns:
            Whether it is worth trying again.
        """
        if time.monotonic() < self._hopeless_until:
            return False
        before = self.cache.objects.generation()
        try:
            with exclusive(self.cache, _LOCK_SECONDS) as alone:
                if not alone or self.cache.objects.generation() != before:
                    return True  # another process or thread has just done it
                self._evict(lambda _: self._room(size))
        except OSError as error:
            _log.debug("cache cannot be looked after", error=error)
        if self.cache.objects.generation() != before:
            return True
        self._hopeless_until = time.monotonic() + _HOPELESS_SECONDS
        return False

    def _room(self, size: int) -> Shortage:
        status = os.statvfs(self.cache.root)
        whole = status.f_blocks * status.f_frsize
        if status.f_files and status.f_favail < _ROOM_INODES // 8:
            return Shortage(inodes=min(_ROOM_INODES, status.f_files // 8))
        return Shortage(max(2 * size, min(_ROOM_BYTES, whole // 8)))

    def _reserve_shortage(self) -> Shortage:
        status = os.statvfs(self.cache.root)
        reserve = self.limits.reserve(status)
        free = status.f_bavail * status.f_frsize
        disk_bytes = reserve + reserve // _SLACK - free if free < reserve else 0
        kept = status.f_files // _INODE_SHARE  # 0 where inodes are made as needed
        inodes = 2 * kept - status.f_favail if status.f_favail < kept else 0
        return Shortage(disk_bytes, inodes)

    def _shortage(self, total: int | None) -> Shortage:
        """How much must go now; with the lock held.

        Args:
            total: what the contents take, without layer files, if they have just been counted.
        """
        reserve = self._reserve_shortage()
        limit = self.limits.size_limit_bytes
        if not limit:
            return reserve
        total = self._with_layers(self._add_up() if total is None else total)
        over = total - (limit - limit // _SLACK) if total > limit else 0
        return Shortage(max(reserve.disk_bytes, over), reserve.inodes)

    def _with_layers(self, contents: int) -> int:
        """The bytes that the limit is for, given what the contents take."""
        limit = self.limits.size_limit_bytes
        changed = os.stat(self.cache.index).st_mtime_ns, os.stat(self.cache.trees).st_mtime_ns
        if self._layers[0] != changed:
            self._layers = changed, sum(entry.disk_bytes for entry in layer_files(self.cache.paths))
        layers = self._layers[1]
        if contents + layers <= limit:
            return contents + layers
        idle = sum(entry.disk_bytes for entry in self._idle_layers())
        return contents + idle + min(layers - idle, limit // _LAYERS_SHARE)

    def _idle_layers(self) -> list[Entry]:
        """The layer files that no slot needs, nor one that is being made."""
        latest = time.time_ns() - _IN_THE_MAKING_NANOSECONDS
        old = [entry for entry in layer_files(self.cache.paths) if entry.used_ns < latest]
        # Looked up afterwards: what comes into use meanwhile has just been opened.
        used = self._in_use() if old else None
        return [] if used is None else [entry for entry in old if entry.name not in used]

    def _add_up(self) -> int:
        """The bytes that the contents take, from the file that all processes add to."""
        with self._lock:
            pending, self._pending = self._pending, 0
        known = self._read_usage()
        if known is None:
            total, when = sum(entry.disk_bytes for entry in entries(self.cache)), time.time()
        else:
            total, when = known[0] + pending, known[1]
        if pending or known is None:
            self._write_usage(total, when)
        return total

    def _read_usage(self) -> tuple[int, float] | None:
        """Sum, and when it was counted; None if it must be counted again."""
        try:
            with open(self._usage) as file:
                total, when = file.read(100).split()
            if abs(time.time() - float(when)) < _COUNT_AGAIN_SECONDS:
                return int(total), float(when)
        except (OSError, ValueError):
            pass
        return None

    def _write_usage(self, total: int, when: float) -> None:
        # In place and not synced: a wrong number leads to a count, see `_evict`.
        with contextlib.suppress(OSError), open(self._usage, "w") as file:
            file.write(f"{total} {when:.0f}\n")

    def _evict(self, shortage_of: Callable[[int | None], Shortage]) -> int:
        """Remove what was not used for longest until nothing is short; with the lock held.

        Args:
            shortage_of: what is short, given what the contents take, or None if that is not known.

        Returns:
            How many bytes went.
        """
        shortage = shortage_of(None)
        if not shortage:
            return 0
        evicted = count = 0
        for _ in range(3):
            total, oldest = self._oldest(shortage.doubled())
            # The sum may have been wrong, and others have stored meanwhile.
            exact = shortage_of(total)
            removed = self._remove(oldest, exact)
            evicted += sum(entry.disk_bytes for entry in removed)
            count += len(removed)
            if self.limits.size_limit_bytes:
                gone = sum(entry.disk_bytes for entry in removed if _is_content(entry))
                self._write_usage(total - gone, time.time())
            if exact.disk_bytes <= shortage.disk_bytes and exact.inodes <= shortage.inodes:
                break
            shortage = exact
        if count:
            with contextlib.suppress(OSError), open(self._last, "w"):
                pass  # its modification time tells all processes
            counts.add(families.EVICTED, amount=count)
            counts.add(families.EVICTED_BYTES, amount=evicted)
            _log.info("cache evicted", contents=count, bytes=evicted)
        return evicted

    def _oldest(self, shortage: Shortage) -> tuple[int, list[Entry]]:
        """The bytes that all contents take, and the oldest entries that are enough, oldest first."""
        # A heap of the oldest so far with the newest of them on top: memory is needed for what goes,
        # not for what stays.
        heap: list[tuple[int, int, Entry]] = []
        total = disk_bytes = inodes = 0
        for number, entry in enumerate(chain(entries(self.cache), self._idle_layers())):
            if not entry.disk_bytes and not shortage.inodes:
                continue
            total += entry.disk_bytes if _is_content(entry) else 0
            heapq.heappush(heap, (-entry.used_ns, number, entry))
            disk_bytes += entry.disk_bytes
            inodes += entry.inodes
            while True:
                top = heap[0][2]
                if not shortage.met_by(disk_bytes - top.disk_bytes, inodes - top.inodes):
                    break
                heapq.heappop(heap)
                disk_bytes -= top.disk_bytes
                inodes -= top.inodes
        return total, sorted((entry for *_, entry in heap), key=lambda entry: entry.used_ns)

    def _remove(self, oldest: list[Entry], shortage: Shortage) -> list[Entry]:
        """Remove what is short, and put what would go next on probation; what was removed."""
        disk_bytes = inodes = 0
        removed: list[Entry] = []
        for entry in oldest:
            if shortage.met_by(disk_bytes, inodes):
                if entry.kind is Kind.OBJECT:
                    self.cache.objects.put_on_probation(entry.key)
                continue
            remove(self.cache, entry)
            disk_bytes += entry.disk_bytes
            inodes += entry.inodes
            removed.append(entry)
        return removed


def _is_content(entry: Entry) -> bool:
    return entry.kind in (Kind.OBJECT, Kind.PARTIAL)
