# SPDX-License-Identifier: Apache-2.0
"""Reads the files of one layer: from the cache, and what is missing through its fetcher.

Knows nothing of FUSE or HTTP.

Invariant: no byte is returned that was not compared with its digest, by this process or before it was
sealed in the cache. All state is touched on the event loop only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from lazysnap.errors import Internal
from lazysnap.fetch.fetcher import Fetcher
from lazysnap.fetch.open_files import Content, OpenFiles, Parts, Whole
from lazysnap.fetch.threads import ELSEWHERE, LARGE
from lazysnap.index.model import FileContent
from lazysnap.index.reader import LayerIndex
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts

# A chunk that was just stored can be evicted, or dropped by another process, before it is read.
_ATTEMPTS = 4
# The kernel asks for so much at once only if a file is read in sequence.
_LARGE_READ = 512 << 10
_READ_AHEAD = 4 << 20


class LayerReader:
    """Reads one layer.

    Args:
        index: the layer's index.
        contents: the process's table of open contents.
        fetcher: brings what is missing.
        missed: told the node of a file that a reader has to wait for.
        begun: told the node of a file whose beginning is read.

    Attributes:
        begun: as above, for those who read without this.
    """

    def __init__(
        self,
        index: LayerIndex,
        contents: OpenFiles,
        fetcher: Fetcher,
        missed: Callable[[int], None] = lambda node: None,
        begun: Callable[[int], None] = lambda node: None,
    ) -> None:
        self.index = index
        self.fetcher = fetcher
        self._contents = contents
        self._missed = missed
        self.begun = begun

    def read_nowait(self, node: int, offset: int, size: int) -> bytes | memoryview | None:
        """Read what needs neither the network nor a disk.

        Args:
            node: a regular file of the index.
            offset: where to begin, in bytes.
            size: how many bytes at the most.

        Returns:
            The bytes, fewer than `size` only at the end of the file; None when it has to wait. They
            are good until the next call for any layer, as all calls share one buffer.
        """
        file = self.index.file(node)
        size = min(size, file.size - offset)
        if size <= 0:
            return b""
        if offset == 0:
            self.begun(node)
        content = self._contents.find(file)
        if content is None:
            return None
        if isinstance(content, Parts):
            if self._unusable(content, node, file, offset, size):
                return None
            self.fetcher.advance(self.index.chunk(self.index.chunk_at(node, offset)).member)
        # Not a new one each time: to clear a megabyte takes as long as to read it.
        shared = self._contents.buffer
        buffer = shared[:size] if size <= len(shared) else memoryview(bytearray(size))
        return buffer if _read_resident(content.fd, offset, buffer) else None

    async def read(self, node: int, offset: int, size: int) -> bytes:
        """Read a range of a file, wherever its bytes are now.

        Arguments and result are those of `read_nowait`.

        Raises:
            LazysnapError: the bytes cannot be had, or not with the right digest.
        """
        file = self.index.file(node)
        size = min(size, file.size - offset)
        if size <= 0:
            return b""
        kept: list[int] = []
        try:
            for _ in range(_ATTEMPTS):
                content = await self._open(file)
                # Other tasks run in between, and may make the table evict it.
                with self._contents.holding(content):
                    data = await self._attempt(content, node, file, offset, size)
                if data is not None:
                    return data
                if not kept:
                    # The chunks were fetched, and are read from the cache now. If they were evicted
                    # meanwhile, as the disk is full, the next attempt takes them from memory.
                    kept = self._members(node, offset, size)
                    self.fetcher.requests.kept.update(kept)
        finally:
            self.fetcher.requests.kept.difference_update(kept)
        raise Internal("bytes vanish from the cache as soon as they are stored")

    def _members(self, node: int, offset: int, size: int) -> list[int]:
        """The members that a range of a file is in."""
        first = self.index.chunk_at(node, offset)
        last = self.index.chunk_at(node, offset + size - 1)
        return [self.index.chunk(i).member for i in range(first, last + 1)]

    async def _attempt(
        self, content: Content | None, node: int, file: FileContent, offset: int, size: int
    ) -> bytes | None:
        """Read a range, or see to it that the next attempt can (None)."""
        chunks = await self._missing(content, node, file, offset, size)
        if not chunks and content is not None:
            data = await self._read_disk(content, offset, size)
            if data is None and isinstance(content, Whole):
                # Cut off, or on a bad spot of the disk: then `verify` removes it. What others have
                # open they keep.
                self._contents.forget(file.object_key)
                await self._verify(file)
            return data
        members = sorted({self.index.chunk(i).member for i in chunks})
        flights = self.fetcher.fetch(members) if members else []
        if members:
            counts.add(families.READS_MISSED)
            counts.add(families.READ_BYTES_MISSED, amount=size)
            self._missed(node)
        unstored: dict[int, bytes] = {}
        # Only what is fetched ahead has its ticket before its turn.
        ahead = any(flight.ticket is not None for flight in flights) if flights else None
        with self.fetcher.requests.trace.waiting(node, offset, size, ahead):
            for flight in flights:
                await flight.landed.wait()
                if flight.error is not None:
                    raise flight.error
                unstored.update(flight.unstored)
        if unstored or not chunks:
            return self._assemble(unstored, node, file, offset, size)
        return None

    def _unusable(
        self, parts: Parts, node: int, file: FileContent, offset: int, size: int
    ) -> list[int]:
        """The chunks of a range that may not be read from the partial file yet."""
        first = self.index.chunk_at(node, offset) - file.first_chunk
        last = self.index.chunk_at(node, offset + size - 1) - file.first_chunk
        if parts.file.usable(first, last):
            return []
        return [file.first_chunk + n for n in parts.file.missing(first, last)]

    async def _open(self, file: FileContent) -> Content | None:
        """The file's content, after a look at what an earlier process left of it."""
        content = self._contents.find(file)
        objects = self._contents.cache.objects
        if content is None and objects.exists(file.object_key, file.size):
            await self._verify(file, unless_open=True)
            content = self._contents.find(file)
        if content is None and file.partial_key is not None:
            content = self._contents.create(self.index, file)
        return content

    async def _verify(self, file: FileContent, *, unless_open: bool = False) -> None:
        """Have a file's object compared with its digest, which alone says whether it is right.

        Args:
            file: whose.
            unless_open: not if somebody else has done so while this waited for its turn.
        """
        threads = self._contents.threads
        async with threads.large_checks if file.size > LARGE else threads.checks:
            if not unless_open or self._contents.find(file) is None:
                verify = self._contents.cache.objects.verify
                await trio.to_thread.run_sync(verify, file.object_key, limiter=ELSEWHERE)

    async def _missing(
        self, content: Content | None, node: int, file: FileContent, offset: int, size: int
    ) -> list[int]:
        """The chunks that must be fetched for a range of a file."""
        if content is None:
            first = self.index.chunk_at(node, offset)
            last = self.index.chunk_at(node, offset + size - 1)
            return [i for i in range(first, last + 1) if self.index.chunk(i).member >= 0]
        if not isinstance(content, Parts):
            return []
        chunks = self._unusable(content, node, file, offset, size)
        if any(content.file.claimed(i - file.first_chunk) for i in chunks):
            limiter = self._contents.threads.checks
            recall = partial(self._recall, content, file, chunks)
            chunks = await trio.to_thread.run_sync(recall, limiter=limiter)
        return chunks

    def _recall(self, parts: Parts, file: FileContent, chunks: Sequence[int]) -> list[int]:
        """In a thread: verify what the map claims; returns the chunks that must be fetched."""
        missing = []
        for i in chunks:
            chunk = self.index.chunk(i)
            number = i - file.first_chunk
            # Chunks of an unverified layer in the cache cannot be checked, so they are fetched again.
            if chunk.digest is None or not parts.file.recall(
                number, chunk.file_offset, chunk.size, chunk.digest
            ):
                missing.append(i)
        return missing

    async def _read_disk(self, content: Content, offset: int, size: int) -> bytes | None:
        try:
            limiter = self._contents.threads.reads
            data = await trio.to_thread.run_sync(
                _read_on, content.fd, size, offset, limiter=limiter
            )
        except OSError as error:
            self._contents.complain(error)
            return None
        return data if len(data) == size else None

    def _assemble(
        self, unstored: Mapping[int, bytes], node: int, file: FileContent, offset: int, size: int
    ) -> bytes | None:
        """Put a range together from chunks in memory, holes, and the disk where it has the rest."""
        first = self.index.chunk_at(node, offset)
        last = self.index.chunk_at(node, offset + size - 1)
        result = bytearray(size)
        for i in range(first, last + 1):
            chunk = self.index.chunk(i)
            begin = max(offset, chunk.file_offset)
            end = min(offset + size, chunk.file_offset + chunk.size)
            if i in unstored:
                piece = unstored[i][begin - chunk.file_offset : end - chunk.file_offset]
            elif chunk.member < 0:
                continue
            else:
                content = self._contents.find(file)
                if not isinstance(content, Parts) or not content.file.usable(
                    i - file.first_chunk, i - file.first_chunk
                ):
                    return None
                piece = os.pread(content.fd, end - begin, begin)
            result[begin - offset : end - offset] = piece
        return bytes(result) if len(result) == size else None


def _read_resident(fd: int, offset: int, buffer: memoryview) -> bool:
    """Fill a buffer from the page cache only; False when some of it is not there."""
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            return False
        # A file system without RWF_NOWAIT.
        count = os.preadv(fd, [buffer], offset)
    return count == len(buffer)


def _read_on(fd: int, size: int, offset: int) -> bytes:
    """In a thread: read from the disk, and have the kernel fetch what a sequential reader wants next.

    By itself it reads only a little ahead (`read_ahead_kb` of the disk), also for reads with RWF_NOWAIT,
    as all that follow are if they can (seen on Linux 6.18). Each that comes too early needs a thread again.
    """
    data = os.pread(fd, size, offset)
    if size >= _LARGE_READ:
        os.posix_fadvise(fd, offset + size, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
    return data
