# SPDX-License-Identifier: Apache-2.0
"""The open contents of a process: file descriptors of objects and partial files, least used closed.

Content keys are global, so all layers of a process share one table. What a layer says of a content is a
claim: objects and partial files are told apart, and an object is only found by its true size. Used on the
event loop only; each method is plain `def`, so no other task sees it half done. A content that is evicted
from the table while a thread uses it is closed when the thread lets go of it.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from lazysnap import log
from lazysnap.cache import Cache, PartialFile
from lazysnap.cache.eviction import Evictor
from lazysnap.fetch.threads import Threads
from lazysnap.index.model import NO_KEY, Chunk, FileContent
from lazysnap.index.reader import LayerIndex

_log = log.get(__name__)
# A promoted file is read once more to check it; beyond this size that is not worth it.
_MAX_PROMOTED = 64 << 30
# Nor is it if most of the file are holes, which cost nothing to claim, and as much as bytes to hash.
_STORED_SHARE = 4
# Files that wait for their promotion; those that come then stay partial.
_PROMOTIONS_MOST = 4096
_COMPLAIN_EVERY_SECONDS = 60.0
_MOST_OPEN = 4096
# As much as the kernel asks for at once (FUSE_MAX_MAX_PAGES of libfuse).
_LARGEST_READ = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True)
class Whole:
    """A complete object that is open."""

    fd: int
    size: int
    users: int = 0
    evicted: bool = False

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self.fd)


@dataclass(slots=True)
class Parts:
    """A partial file that is open."""

    file: PartialFile
    key: bytes
    object_key: bytes
    users: int = 0
    evicted: bool = False
    promoting: bool = False
    # The kernel lets one thread at a time write to a file, and the others spin on a CPU until then.
    writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fd(self) -> int:
        """Where the usable chunks are read from."""
        return self.file.fd

    def close(self) -> None:
        """Release the file."""
        self.file.close()


Content = Whole | Parts
# Not the key alone: a layer can claim that an object has the name of somebody's partial file.
_Key = tuple[type[Content], bytes]


class OpenFiles:
    """The table of open contents.

    Args:
        cache: where the contents are.
        limit: how many may be open; by default as many as leave enough descriptors for the rest.
        evictor: frees space when the disk is full; None: nothing is evicted.

    Attributes:
        buffer: for a caller that reads and hands on the bytes at once, without an await in between.
        threads: of the process.
    """

    def __init__(
        self, cache: Cache, limit: int | None = None, evictor: Evictor | None = None
    ) -> None:
        self.cache = cache
        self.evictor = evictor
        self.limit = _affordable() if limit is None else limit
        self.buffer = memoryview(bytearray(_LARGEST_READ))
        self.threads = Threads()
        self._open: OrderedDict[_Key, Content] = OrderedDict()
        self._complaints: dict[str, float] = {}

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._drop(self._open.popitem()[1])

    def find(self, content: FileContent) -> Content | None:
        """The open content of a file, opening it if the cache has it.

        Returns:
            None if nothing of it is known to be right; then `verify` or `create` may help.
        """
        key: _Key = (Whole, content.object_key)
        found = self._open.get(key)
        if isinstance(found, Whole) and found.size != content.size:
            found = None  # it is another layer's, which tells another size
        if found is None and content.partial_key is not None:
            key = (Parts, content.partial_key)
            found = self._open.get(key)
        if found is not None:
            self._open.move_to_end(key)
            return found
        fd = self.cache.objects.open(content.object_key, content.size)
        if fd is None:
            return None
        return self._keep((Whole, content.object_key), Whole(fd, content.size))

    def create(self, index: LayerIndex, content: FileContent) -> Parts | None:
        """Open the partial file of a file of several chunks, or begin one.

        Returns:
            None if the disk does not allow it.
        """
        key = content.partial_key
        assert key is not None
        found = self._open.get((Parts, key))
        if isinstance(found, Parts):
            return found
        holes = index.holes(content)
        try:
            file = PartialFile(self.cache.partial, key, content.size, content.chunk_count, holes)
        except OSError as error:
            if error.errno != errno.EFBIG:  # a layer can tell any size
                self.complain(error)
            return None
        parts = Parts(file, key, content.object_key)
        self._keep((Parts, key), parts)
        return parts

    def hold(self, content: Content) -> None:
        """Keep a content open while a thread uses it, or while other tasks may run in between."""
        # A closed content must not come back: its descriptor may be another file's by now.
        assert content.users or not content.evicted
        content.users += 1

    def release(self, content: Content) -> None:
        """End of `hold`."""
        assert content.users > 0
        content.users -= 1
        if content.evicted and content.users == 0:
            content.close()

    @contextmanager
    def holding(self, content: Content | None) -> Iterator[None]:
        """`hold` and `release` around a block; nothing for None."""
        if content is None:
            yield
            return
        self.hold(content)
        try:
            yield
        finally:
            self.release(content)

    def forget(self, key: bytes) -> None:
        """Take the object of a key out of the table."""
        self._forget((Whole, key))

    def forget_partial(self, key: bytes) -> None:
        """Take the partial file of a key out of the table, as it has become an object."""
        self._forget((Parts, key))

    def _forget(self, key: _Key) -> None:
        content = self._open.pop(key, None)
        if content is not None:
            self._drop(content)

    def sweep(self) -> None:
        """Close what has no name any more and is not in use, so that the disk gets its blocks."""
        gone = [
            key
            for key, content in self._open.items()
            if not content.users and os.fstat(content.fd).st_nlink == 0
        ]
        for key in gone:
            self._forget(key)

    def make_room(self, error: OSError, size: int) -> bool:
        """In a thread: evict if the disk is full.

        Args:
            error: why something could not be stored.
            size: of what could not be stored, in bytes.

        Returns:
            Whether it is worth trying again.
        """
        if error.errno not in _NO_ROOM or self.evictor is None:
            return False
        if not self.evictor.make_room(size):
            return False
        trio.from_thread.run_sync(self.sweep)
        return True

    def complain(self, error: OSError) -> None:
        """Log that the cache's disk fails; once a minute for each kind of trouble."""
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        now = time.monotonic()
        if now - self._complaints.get(name, float("-inf")) >= _COMPLAIN_EVERY_SECONDS:
            self._complaints[name] = now
            _log.error("cache fails, serving without it", error=error)

    def may_promote(self, parts: Parts) -> bool:
        """Whether to make a complete partial file an object now; notes that it is done if so."""
        if parts.promoting or parts.object_key == NO_KEY or not parts.file.complete:
            return False
        if self.threads.promotions.statistics().tasks_waiting >= _PROMOTIONS_MOST:
            return False
        parts.promoting = True
        return True

    def promote(self, parts: Parts, stored: int) -> bool:
        """Make a complete partial file an object; reads all of it, so call it in a thread.

        The file need not be held.

        Args:
            parts: the file.
            stored: how many of its bytes are no holes.

        Returns:
            Whether it is an object now. If its digest is not the one that the table of contents
            claims it stays what it is: all of its chunks are right, and only its name is not. So does
            a file that is too large, or mostly holes.
        """
        if parts.file.size > min(_MAX_PROMOTED, stored * _STORED_SHARE):
            return False
        try:
            if self.cache.objects.adopt(parts.file.base + ".data", parts.object_key):
                parts.file.discard()
                return True
        except FileNotFoundError:
            return True  # another process was first
        except OSError as error:
            self.complain(error)
            return False
        # Not a warning: an image can make as many of these as it likes, and they harm nobody.
        _log.debug("file digest is not the one of its chunks", digest=parts.object_key.hex())
        parts.object_key = NO_KEY
        return False

    def _keep(self, key: _Key, content: Content) -> Content:
        self._forget(key)
        self._open[key] = content
        if len(self._open) > self.limit:
            self._drop(self._open.popitem(last=False)[1])
        return content

    @staticmethod
    def _drop(content: Content) -> None:
        content.evicted = True
        if content.users == 0:
            content.close()


def _affordable() -> int:
    """How many contents may be open: two descriptors each, and half of all are for other things."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(soft // 4, _MOST_OPEN) if soft != resource.RLIM_INFINITY else _MOST_OPEN


def store_chunk(
    contents: OpenFiles,
    index: LayerIndex,
    parts: Mapping[int, Parts | None],
    i: int,
    *,
    chunk: Chunk,
    data: memoryview,
) -> bool:
    """Put a verified chunk into the cache; called in threads.

    Args:
        contents: the table, of which only the cache is used.
        index: of the layer.
        parts: the open partial file of each node of several chunks that the batch touches.
        i: number of the chunk in the layer.
        chunk: its description.
        data: its bytes.

    Returns:
        False if the disk did not take it.
    """
    content = index.file(chunk.node)
    file = parts.get(chunk.node)
    objects = contents.cache.objects
    if content.partial_key is not None:
        if file is None:
            return False
    elif chunk.digest is None or (
        len(index.member_chunks(chunk.member)) > 1
        and objects.exists(content.object_key, content.size)
    ):
        return True
    for again in (True, False):
        try:
            if file is None:
                objects.put(content.object_key, data)
            else:
                with file.writing:
                    file.file.write(i - content.first_chunk, chunk.file_offset, data)
            break
        except OSError as error:
            if not again or not contents.make_room(error, chunk.size):
                contents.complain(error)
                return False
    if contents.evictor is not None:
        contents.evictor.stored(chunk.size)
    return True
