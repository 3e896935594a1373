# SPDX-License-Identifier: Apache-2.0
"""Files of which some chunks are on disk: `partial/<key>.data` (sparse) and `partial/<key>.map`.

The map has one byte for each chunk: 0 missing, 1 present. Nothing is synced, so after a power cut the
map can claim bytes that never reached the disk; therefore a chunk that this process did not write
itself is verified before its first use. The key covers the digest of every chunk, so processes and
layers that share a partial file agree on what it must contain. Knows nothing of FUSE or the network.

Invariant: a chunk is `usable` only if its bytes were checked by this process since it opened the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence

from lazysnap.cache.stamps import touch

PRESENT = 1
"""The byte in a map for a chunk that is there."""
_MISSING = b"\0"
_PRESENT = bytes([PRESENT])


def read_map(directory: str, key: bytes) -> bytes | None:
    """The bytes of a map, without opening the file; None if there is no map.

    A chunk is there if its byte is `PRESENT`; chunks behind the end are missing.

    Args:
        directory: where partial files are kept.
        key: of the file.
    """
    try:
        with open(_map_path(directory, key), "rb") as file:
            return file.read()
    except OSError:
        return None


def claims(directory: str, key: bytes, number: int) -> bool:
    """Whether a map says that a chunk is there; opens, creates and changes nothing else.

    Args:
        directory: where partial files are kept.
        key: of the file.
        number: which chunk of the file.
    """
    try:
        fd = os.open(_map_path(directory, key), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.pread(fd, 1, number) == _PRESENT
    except OSError:
        return False
    finally:
        os.close(fd)


def _map_path(directory: str, key: bytes) -> str:
    return os.path.join(directory, key.hex() + ".map")


class PartialFile:
    """One file that is not complete.

    Its methods may be called from several threads.

    Args:
        directory: where partial files are kept; must exist.
        key: 32 bytes that identify the list of chunks.
        size: length of the complete file in bytes.
        chunk_count: how many chunks it has.
        holes: numbers of the chunks that are all zeros and need not be fetched.

    Raises:
        OSError: the disk is full, or otherwise refuses.
    """

    def __init__(
        self, directory: str, key: bytes, size: int, chunk_count: int, holes: Sequence[int] = ()
    ) -> None:
        self.base = os.path.join(directory, key.hex())
        self.size = size
        self.chunk_count = chunk_count
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.fd = os.open(self.base + ".data", flags, 0o600)
        try:
            status = os.fstat(self.fd)
            if status.st_size != size:
                os.ftruncate(self.fd, size)
            touch(self.fd, status)
            # Not mapped into memory: a store to a mapped hole of a full disk is a SIGBUS.
            self._map_fd = os.open(self.base + ".map", flags, 0o600)
        except OSError:
            os.close(self.fd)
            raise
        self._usable = bytearray(chunk_count)
        for number in holes:
            self._usable[number] = 1

    def close(self) -> None:
        """Release the file."""
        os.close(self._map_fd)
        os.close(self.fd)

    def usable(self, first: int, last: int) -> bool:
        """Whether all chunks from `first` to `last` (inclusive) may be read from `fd`."""
        return self._usable.find(0, first, last + 1) < 0

    def missing(self, first: int, last: int) -> list[int]:
        """The chunks of the range that may not be read yet."""
        return [n for n in range(first, last + 1) if not self._usable[n]]

    @property
    def complete(self) -> bool:
        """Whether all chunks are usable."""
        return self._usable.find(0) < 0

    def write(self, number: int, offset: int, data: bytes | memoryview) -> None:
        """Store a chunk that the caller has verified.

        Args:
            number: which chunk of the file.
            offset: where in the file it belongs, in bytes.
            data: all of its bytes.

        Raises:
            OSError: the disk is full, or otherwise refuses.
        """
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view = view[written:]
            offset += written
        os.pwrite(self._map_fd, _PRESENT, number)
        self._usable[number] = 1

    def recall(self, number: int, offset: int, size: int, digest: bytes) -> bool:
        """Check a chunk that an earlier or another process may have stored.

        Args:
            number: which chunk of the file.
            offset: where it begins, in bytes.
            size: its length in bytes.
            digest: the sha256 that it must have.

        Returns:
            Whether it is usable now; a wrong one is forgotten.
        """
        if self._usable[number]:
            return True
        if not self.claimed(number):
            return False
        # A chunk that a failing disk cannot give back is fetched again.
        with contextlib.suppress(OSError):
            data = os.pread(self.fd, size, offset)
            if len(data) == size and hashlib.sha256(data).digest() == digest:
                self._usable[number] = 1
                return True
            os.pwrite(self._map_fd, _MISSING, number)
        return False

    def claimed(self, number: int) -> bool:
        """Whether the map says that a chunk is there."""
        try:
            return os.pread(self._map_fd, 1, number) == _PRESENT
        except OSError:
            return False

    def discard(self) -> None:
        """Remove the file's names; it stays usable until it is closed."""
        for suffix in (".data", ".map"):
            with contextlib.suppress(OSError):
                os.unlink(self.base + suffix)
