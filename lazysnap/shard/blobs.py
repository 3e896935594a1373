# SPDX-License-Identifier: Apache-2.0
"""Whole blobs of layers, for clients that export an image: downloaded, checked, forgotten after use.

A blob is in a file without a name while somebody has it open, so nothing of it is left however this
process ends. Knows nothing of FUSE.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lazysnap.digest import Digest
from lazysnap.errors import DigestMismatch, Internal
from lazysnap.registry.client import Blob

_PIECE = 1 << 20


@dataclass
class _Open:
    """A blob that somebody has open."""

    users: int = 0
    fd: int = -1
    lock: trio.Lock = field(default_factory=trio.Lock)


class WholeBlobs:
    """The blobs that are open.

    Args:
        directory: on whose file system they are while they are open.
        source: the blob of a slot, to be read from its registry.
    """

    def __init__(self, directory: str, source: Callable[[int], Awaitable[Blob]]) -> None:
        self._directory = directory
        self._source = source
        self._open: dict[int, _Open] = {}

    async def open(self, slot: int) -> None:
        """Download a slot's blob unless it is open; the caller has to `release` it.

        Raises:
            DigestMismatch: the registry sends something else.
            RegistryError: or one of its kinds.
            Internal: the disk is full, or fails.
        """
        self._open.setdefault(slot, _Open()).users += 1
        try:
            await self._have(slot)
        except BaseException:
            self.release(slot)
            raise

    async def read(self, slot: int, offset: int, size: int) -> bytes:
        """Bytes of a blob; it may have been opened when an earlier worker served.

        Raises:
            LazysnapError: as for `open`.
        """
        fd = await self._have(slot)
        return await trio.to_thread.run_sync(os.pread, fd, size, offset)

    def release(self, slot: int) -> None:
        """Note that somebody has closed a blob."""
        found = self._open.get(slot)
        if found is None:
            return
        found.users -= 1
        if found.users <= 0 and not found.lock.locked():
            del self._open[slot]
            if found.fd >= 0:
                os.close(found.fd)

    async def _have(self, slot: int) -> int:
        found = self._open.setdefault(slot, _Open())
        async with found.lock:
            if found.fd < 0:
                found.fd = await self._download(await self._source(slot))
        return found.fd

    async def _download(self, blob: Blob) -> int:
        """A descriptor of a checked copy."""
        hasher = Digest.parse(blob.digest).hasher()
        try:
            with tempfile.TemporaryFile(dir=self._directory) as file:

                def add(piece: bytes) -> None:
                    hasher.update(piece)
                    file.write(piece)

                pending = bytearray()
                async with blob.whole_stream() as stream:
                    async for piece in stream:
                        pending += piece
                        if len(pending) >= _PIECE:
                            await trio.to_thread.run_sync(add, bytes(pending))
                            pending.clear()
                await trio.to_thread.run_sync(add, bytes(pending))
                await trio.to_thread.run_sync(file.flush)
                if Digest.from_hash(hasher) != blob.digest:
                    raise DigestMismatch(f"the registry sends other bytes for blob {blob.digest}")
                return os.dup(file.fileno())
        except OSError as error:
            raise Internal(f"blob {blob.digest} cannot be kept: {error.strerror}") from error
