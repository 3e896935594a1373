# SPDX-License-Identifier: Apache-2.0
"""The bytes of a layer's tar, decompressed and hashed in a thread beside the one that uses them.

Reading, both digests and inflating release the GIL for nearly all of their time, so that they run while
the other thread makes files. At most a few MiB are held, whatever the compressed bytes claim. The
compression is told by the first bytes, as in containerd (archive/compression): media types are wrong
often enough.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import zstandard
from isal import igzip_lib

from lazysnap.digest import Digest
from lazysnap.errors import DigestMismatch, FormatError, Internal
from lazysnap.formats import gzip, zstd

_READ = 256 << 10
_PIECE = 512 << 10
_PIECES = 6
# The window that a level up to 22 without --long may ask for.
_MAX_WINDOW = 1 << 27
_SKIPPABLE = zstd.SKIPPABLE_MAGIC >> 4
_DamagedGzip: type[Exception] = cast("type[Exception]", igzip_lib.error)


class Source(Protocol):
    """Where a layer's blob comes from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, perhaps fewer; none at the end. Blocks."""
        ...


class TarStream:
    """The uncompressed bytes of a layer; use it as a context manager, from one thread.

    Args:
        source: of the blob; only read by the stream's own thread.
        digest: that the blob must have; None not to check.
        diff_id: that the uncompressed bytes must have; None not to check.
        limit: most uncompressed bytes; None for no limit.

    Attributes:
        position: number of bytes that were handed out or skipped.
    """

    def __init__(
        self,
        source: Source,
        *,
        digest: Digest | None = None,
        diff_id: Digest | None = None,
        limit: int | None = None,
    ) -> None:
        self.position = 0
        self._blob = _Blob(source, digest)
        self._expected = diff_id
        self._hash = diff_id.hasher() if diff_id else Digest.of(b"").hasher()
        self._limit = limit
        self._size = 0
        self._queue: queue.Queue[bytes | BaseException] = queue.Queue(_PIECES)
        self._stopped = False
        self._ended = False
        self._buffer = memoryview(b"")
        self._thread = threading.Thread(target=self._produce, name="inflate", daemon=True)

    def __enter__(self) -> TarStream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The thread may be waiting for room in the queue.
        self._stopped = True
        while not self._ended:
            item = self._queue.get()
            self._ended = not item or isinstance(item, BaseException)
        self._thread.join()

    # -- the user's side ----------------------------------------------------------------------------

    def _more(self) -> bool:
        """Get the next piece into the empty buffer; false at the end."""
        if self._ended:
            return False
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._ended = not item
        self._buffer = memoryview(item)
        return not self._ended

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or none at all if the tar has ended before.

        Raises:
            FormatError: it ends within them.
        """
        buffer = self._buffer
        if len(buffer) >= size:
            self._buffer = buffer[size:]
            self.position += size
            return bytes(buffer[:size])
        parts = [bytes(part) for part in self._parts(size)]
        if parts and sum(map(len, parts)) < size:
            raise FormatError("the tar is cut off")
        return b"".join(parts)

    def pieces(self, size: int) -> Iterable[memoryview]:
        """Exactly `size` bytes, in pieces as they come.

        Raises:
            FormatError: the tar ends within them.
        """
        buffer = self._buffer
        if size <= len(buffer):  # so with most files, and quicker than by generators
            self._buffer = buffer[size:]
            self.position += size
            return (buffer[:size],)
        return self._long(size)

    def _long(self, size: int) -> Iterator[memoryview]:
        left = size
        for part in self._parts(size):
            left -= len(part)
            yield part
        if left:
            raise FormatError("the tar is cut off within a file")

    def _parts(self, size: int) -> Iterator[memoryview]:
        while size > 0 and (len(self._buffer) or self._more()):
            part = self._buffer[:size]
            self._buffer = self._buffer[size:]
            self.position += len(part)
            size -= len(part)
            yield part

    def skip(self, size: int) -> None:
        """Pass over bytes.

        Raises:
            FormatError: the tar ends within them.
        """
        for _ in self.pieces(size):
            pass

    def finish(self) -> tuple[Digest, int]:
        """Read to the end and check both digests.

        Returns:
            The diff id and the number of uncompressed bytes.

        Raises:
            DigestMismatch: the layer is another one.
        """
        for _ in self._parts(1 << 63):
            pass
        self._blob.check()
        found = Digest.from_hash(self._hash)
        if self._expected is not None and found != self._expected:
            raise DigestMismatch(
                f"it unpacks to {found}, the image's configuration says {self._expected}",
                hint="the image is damaged: build and push it again",
            )
        return found, self._size

    # -- the thread's side --------------------------------------------------------------------------

    def _produce(self) -> None:
        try:
            pieces = _decompressed(self._blob)
            own: Any = self._hash
            blob_hash = self._blob.hash
            if pieces is self._blob and blob_hash is not None and blob_hash.name == own.name:
                # The blob of an uncompressed layer is its tar: the same bytes are not hashed twice.
                self._hash, own = blob_hash, None
            for piece in pieces:
                self._size += len(piece)
                if self._limit is not None and self._size > self._limit:
                    self._too_big()
                if own is not None:
                    own.update(piece)
                if self._stopped:
                    break
                self._queue.put(piece)
            else:
                self._blob.drain()
            self._queue.put(b"")
        except BaseException as error:  # to be raised by whoever reads
            self._queue.put(error)

    def _too_big(self) -> None:
        raise FormatError(
            f"it unpacks to more than the {self._limit} bytes that are allowed", reason="too-big"
        )


class _Blob:
    """Reads the compressed bytes and hashes them on the way.

    Attributes:
        hash: hashlib object over all that was read; None if there is nothing to compare it with.
    """

    def __init__(self, source: Source, digest: Digest | None) -> None:
        self._source = source
        self._expected = digest
        self.hash: Any = digest.hasher() if digest else None
        self._pushed_back = b""

    def read(self, size: int = _READ) -> bytes:
        if self._pushed_back:
            data, self._pushed_back = self._pushed_back[:size], self._pushed_back[size:]
            return data
        try:
            data = self._source.read(size)
        except OSError as error:
            raise Internal(f"its bytes cannot be read: {error.strerror or error}") from error
        if self.hash is not None:
            self.hash.update(data)
        return data

    def __iter__(self) -> Iterator[bytes]:
        """All bytes, as they come."""
        return iter(self.read, b"")

    def start(self, size: int) -> bytes:
        """The first bytes, which are handed out again."""
        head = b""
        while len(head) < size and (more := self.read(size - len(head))):
            head += more
        self._pushed_back = head
        return head

    def drain(self) -> None:
        while self.read():
            pass

    def check(self) -> None:
        if self._expected is not None:
            found = Digest.from_hash(self.hash)
            if found != self._expected:
                raise DigestMismatch(f"the bytes that came have the digest {found}")


def _decompressed(blob: _Blob) -> Iterable[bytes]:
    head = blob.start(4)
    if head.startswith(gzip.MAGIC):
        return _inflated(blob)
    if head == zstd.MAGIC or int.from_bytes(head, "little") >> 4 == _SKIPPABLE:
        return _zstd(blob)
    return blob


def _inflated(blob: _Blob) -> Iterator[bytes]:
    """All members (RFC 1952), with their checksums; what follows the last one is an error."""
    data = blob.read()
    try:
        while data:
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            while not member.eof:
                if member.needs_input and not data and not (data := blob.read()):
                    raise FormatError("the gzip stream is cut off")
                piece = member.decompress(data, _PIECE)
                data = b""
                if piece:
                    yield piece
            data = member.unused_data or blob.read()
    except _DamagedGzip as error:
        raise FormatError(f"the gzip stream is damaged: {error}") from error


def _zstd(blob: _Blob) -> Iterator[bytes]:
    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    try:
        # The interface asks for a file; it only reads.
        source = cast("Any", blob)
        with decoder.stream_reader(source, read_size=_READ, read_across_frames=True) as reader:
            while piece := reader.read(_PIECE):
                yield piece
    except zstandard.ZstdError as error:
        raise FormatError(f"the zstd stream is damaged: {error}") from error
