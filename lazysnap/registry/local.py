# SPDX-License-Identifier: Apache-2.0
"""Images in OCI layouts on this machine, read where they are: directories, and tars of them.

Offers what a registry offers (a manifest by name or digest, ranges of blobs) without copying. As there,
what is returned of a blob is for digests to say, which this module does not check. Format: OCI
image-spec, image-layout.md.
"""

from __future__ import annotations

import os
import stat
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import trio

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import FormatError, InvalidArgument, RegistryError, RegistryNotFound
from lazysnap.reference import ARCHIVE, Reference
from lazysnap.registry.blob import Tail

_NAME = "org.opencontainers.image.ref.name"
_PIECE = 256 << 10
_MOST_MEMBERS = 100_000
_NAMES_TOLD = 10


class _Place(NamedTuple):
    """Where the bytes of a file of a layout are."""

    path: str
    offset: int
    size: int | None


class Layout:
    """One OCI layout. All methods block.

    Args:
        reference: of any image in it; `is_local`.
    """

    def __init__(self, reference: Reference) -> None:
        self.path = reference.path
        self._archive = reference.host == ARCHIVE
        self._members: dict[str, _Place] = {}
        self._read_of: tuple[int, ...] = ()

    def manifest(self, name: str | None, digest: Digest | None) -> tuple[oci.Descriptor, bytes]:
        """A manifest or index.

        Args:
            name: the one that the layout calls so; None for the only one.
            digest: asked for instead.

        Raises:
            RegistryNotFound: there is none.
            FormatError, DigestMismatch: the layout is malformed or damaged.
            RegistryError: it cannot be read.
        """
        found = self._named(name) if digest is None else None
        wanted = digest or (found.digest if found is not None else None)
        assert wanted is not None
        data = self._document(_blob_name(wanted))
        wanted.verify(data, f"manifest in {self.path}")
        if found is None:
            found = oci.Descriptor(media_type=_type_of(data), digest=wanted, size=len(data))
        return found, data

    def _named(self, name: str | None) -> oci.Descriptor:
        index = oci.parse_index(self._document("index.json"))
        entries = [entry for entry in index.manifests or () if entry.is_index or entry.is_manifest]
        if name is not None:
            entries = [entry for entry in entries if entry.annotation(_NAME) == name]
        if len({entry.digest for entry in entries}) == 1:
            return entries[0]
        names = sorted({entry.annotation(_NAME) or "" for entry in index.manifests or ()} - {""})
        raise RegistryNotFound(
            f"{self.path} has {len(entries)} images" + (f" called {name!r}" if name else ""),
            hint="append one of its names with a colon: " + ", ".join(names[:_NAMES_TOLD])
            if names
            else None,
        )

    def _document(self, name: str) -> bytes:
        with self.opened(name) as (fd, offset, size):
            if size > oci.MAX_DOCUMENT:
                raise FormatError(f"{name} in {self.path} has {size} bytes, which is too much")
            return os.pread(fd, size, offset)

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, int, int]]:
        """A file of the layout: a descriptor, where in it the file begins, and its size.

        Raises:
            RegistryNotFound: there is no such file.
            RegistryError: it cannot be read.
        """
        try:
            place = self._place(name)
            # a FIFO must not make us wait
            fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise RegistryError(f"{place.path} is not a file")
                yield fd, place.offset, status.st_size if place.size is None else place.size
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RegistryNotFound(
                f"{self.path} has no {name}",
                hint="is it an OCI layout, and was all of it copied?",
            ) from error
        except (OSError, tarfile.TarError) as error:
            raise RegistryError(
                f"{self.path} cannot be read: {error}",
                hint="an archive must be an uncompressed tar" if self._archive else None,
            ) from error

    def _place(self, name: str) -> _Place:
        if not self._archive:
            return _Place(os.path.join(self.path, name), 0, None)
        status = os.stat(self.path)
        version = status.st_ino, status.st_size, status.st_mtime_ns
        if self._read_of != version:
            self._members = dict(_scan(self.path))
            self._read_of = version
        if name not in self._members:
            raise FileNotFoundError(name)
        return self._members[name]


def _scan(path: str) -> Iterator[tuple[str, _Place]]:
    """Where the files of a tar are. It is read from head to head, not through."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        number = 0
        while (member := archive.next()) is not None:
            number += 1
            if number > _MOST_MEMBERS:
                raise FormatError(f"{path} has more than {_MOST_MEMBERS} members")
            if member.isreg() and not member.issparse():
                name = member.name.removeprefix("./")
                yield name, _Place(path, member.offset_data, member.size)


def _blob_name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _type_of(data: bytes) -> str:
    document = oci.parse_document(data)
    fallback = oci.OCI_INDEX if isinstance(document, oci.Index) else oci.OCI_MANIFEST
    return document.media_type or fallback


class LocalBlob:
    """One blob of a layout, read in parts; what `RemoteBlob` is for registries.

    Args:
        layout: that has it.
        digest: its digest.
        size: in bytes, if a manifest has told it.
    """

    def __init__(self, layout: Layout, digest: Digest, size: int | None) -> None:
        self.digest = digest
        self._layout = layout
        self._size = size
        self._last_success: float | None = None

    @property
    def size(self) -> int | None:
        """Size in bytes; None until it was given or learned."""
        return self._size

    @property
    def last_success(self) -> float | None:
        """When bytes were last read, by time.monotonic(); None if never."""
        return self._last_success

    def note_success(self) -> None:
        """Remember that it can be read."""
        self._last_success = time.monotonic()

    async def tail(self, length: int) -> Tail:
        """The last `length` bytes and the size; see `RemoteBlob.tail`."""
        await self.probe()
        assert self._size is not None
        start = max(0, self._size - length)
        return Tail(await self.read(start, self._size - start), self._size)

    async def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from offset `start`; see `RemoteBlob.read`."""
        async with self.read_stream(start, length) as stream:
            return b"".join([piece async for piece in stream])

    def read_stream(self, start: int, length: int) -> LocalReader:
        """Exactly `length` bytes from offset `start`, in pieces."""
        return LocalReader(self, start, length)

    def whole_stream(self, start: int = 0) -> LocalReader:
        """All bytes from offset `start`; the size must be known."""
        if self._size is None:
            raise InvalidArgument(f"the size of blob {self.digest} is not known")
        return LocalReader(self, start, self._size - start)

    async def probe(self, seconds: float | None = None) -> None:
        """See that the file is there and has the right size.

        Raises:
            RegistryError: or one of its kinds; it has not.
        """
        await trio.to_thread.run_sync(self.read_now, 0, 0)

    def read_now(self, start: int, length: int) -> bytes:
        """Bytes of the file, fewer only at its end; blocks."""
        with self._layout.opened(_blob_name(self.digest)) as (fd, offset, size):
            if self._size not in (None, size):
                raise RegistryError(
                    f"blob {self.digest} in {self._layout.path} has {size} bytes,"
                    f" the manifest says {self._size}"
                )
            self._size = size
            data = os.pread(fd, max(0, min(length, size - start)), offset + start)
        self.note_success()
        return data


class LocalReader:
    """Bytes of a local blob as one stream: exactly those that were asked for, or it raises."""

    def __init__(self, blob: LocalBlob, start: int, length: int) -> None:
        if start < 0 or length < 0 or (blob.size is not None and start + length > blob.size):
            raise InvalidArgument(
                f"bytes {start} to {start + length} are not within blob {blob.digest}"
            )
        self._blob = blob
        self._position = start
        self._end = start + length

    async def __aenter__(self) -> AsyncIterator[bytes]:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There is nothing to close: the file is opened for each piece, as it may be for hours."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes, never empty."""
        if self._position >= self._end:
            raise StopAsyncIteration
        length = min(_PIECE, self._end - self._position)
        data = await trio.to_thread.run_sync(self._blob.read_now, self._position, length)
        if not data:
            raise RegistryError(f"blob {self._blob.digest} is shorter than it was")
        self._position += len(data)
        return data
