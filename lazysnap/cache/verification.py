# SPDX-License-Identifier: Apache-2.0
"""Reads all of the cache and checks it, as no reader does: a seal is not believed here.

Objects are checked by their names, chunks of partial files by the indexes that name them, indexes by
their checksums, and by whether what they say can be true of any blob. A change meanwhile is no error:
contents appear whole, and go.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lazysnap.cache import Cache
from lazysnap.cache.inventory import Entry, Kind, entries, remove
from lazysnap.cache.partial import PRESENT, read_map
from lazysnap.errors import FormatError, LazysnapError
from lazysnap.index.model import FileContent
from lazysnap.index.reader import LayerIndex
from lazysnap.paths import INDEX_TAIL

_READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        what: `object`, `partial` or `index`.
        name: its file name below the cache.
        problem: what is wrong with it.
        removed: whether it was removed.
    """

    what: str
    name: str
    problem: str
    removed: bool


@dataclass(slots=True)
class Verification:
    """The outcome: how much was checked, and what was found.

    Attributes:
        objects, partials, indexes: how many were looked at.
        chunks: of partial files, how many were checked.
        bytes: read and compared.
        unchecked: partial files with bytes that nothing tells how to check.
        wrong: what is not as it must be.
    """

    objects: int = 0
    partials: int = 0
    indexes: int = 0
    chunks: int = 0
    bytes: int = 0
    unchecked: int = 0
    wrong: list[Finding] = field(default_factory=list)


def verify(
    cache: Cache, *, fix: bool, progress: Callable[[int], None] = lambda _: None
) -> Verification:
    """Check everything.

    Args:
        cache: what to check.
        fix: remove what is wrong; it is fetched again when it is needed.
        progress: called with numbers of bytes that were read.

    Raises:
        OSError: a directory of the cache cannot be read.
    """
    return _Verifier(cache, fix, progress).run()


class _Verifier:
    def __init__(self, cache: Cache, fix: bool, progress: Callable[[int], None]) -> None:
        self._cache = cache
        self._fix = fix
        self._progress = progress
        self._result = Verification()

    def run(self) -> Verification:
        partials: dict[bytes, Entry] = {}
        for entry in entries(self._cache):
            if entry.kind is Kind.OBJECT:
                self._object(entry)
            else:
                partials[entry.key] = entry
        self._result.partials = len(partials)
        for name in sorted(os.listdir(self._cache.index)):
            # A tail is checked by whoever uses it, and harms nobody.
            if ".new-" not in name and not name.endswith(INDEX_TAIL):
                self._index(name, partials)
        self._result.unchecked += sum(
            any(read_map(self._cache.partial, key) or b"") for key in partials
        )
        return self._result

    def _wrong(self, what: str, name: str, problem: str, undo: Callable[[], object]) -> None:
        if self._fix:
            undo()
        self._result.wrong.append(Finding(what, name, problem, self._fix))

    def _object(self, entry: Entry) -> None:
        name = self._cache.objects.name(entry.key)
        problem = ""
        hasher = hashlib.sha256()
        try:
            for piece in self._pieces(self._cache.objects.path(entry.key)):
                hasher.update(piece)
            if hasher.digest() != entry.key:
                problem = f"its digest is {hasher.hexdigest()}"
        except FileNotFoundError:
            return
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        self._result.objects += 1
        if problem:
            self._wrong("object", f"objects/{name}", problem, lambda: remove(self._cache, entry))

    def _pieces(self, path: str) -> Iterator[bytes]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Not what happens to be in memory: the disk's bytes are the question.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            offset = 0
            while piece := os.pread(fd, _READ_SIZE, offset):
                offset += len(piece)
                self._count(len(piece))
                yield piece
        finally:
            os.close(fd)

    def _count(self, size: int) -> None:
        self._result.bytes += size
        self._progress(size)

    def _index(self, name: str, partials: dict[bytes, Entry]) -> None:
        """Check an index, and with it the partial files that it names: these leave `partials`."""
        path = self._cache.paths.index(name)
        try:
            with open(path, "rb") as file:
                index = LayerIndex(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            _check_places(index)
            for content in _contents(index):
                key = content.partial_key
                entry = partials.pop(key, None) if key else None
                if entry is not None:
                    self._partial(index, content, entry)
        except FileNotFoundError:
            return
        except (OSError, ValueError, LazysnapError) as error:
            self._wrong("index", f"index/{name}", str(error), lambda: _unlink(path))
        self._result.indexes += 1

    def _partial(self, index: LayerIndex, content: FileContent, entry: Entry) -> None:
        name = entry.key.hex()
        bad = unchecked = 0
        chunk_map = read_map(self._cache.partial, entry.key) or b""
        problem = ""
        try:
            fd = os.open(os.path.join(self._cache.partial, name + ".data"), os.O_RDONLY)
        except OSError:
            return  # gone
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for number in range(min(content.chunk_count, len(chunk_map))):
                chunk = index.chunk(content.first_chunk + number)
                if chunk_map[number] != PRESENT or chunk.member < 0:
                    continue
                if chunk.digest is None:
                    unchecked += 1
                    continue
                data = os.pread(fd, chunk.size, chunk.file_offset)
                self._count(len(data))
                self._result.chunks += 1
                bad += hashlib.sha256(data).digest() != chunk.digest
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        finally:
            os.close(fd)
        self._result.unchecked += unchecked > 0
        if bad:
            problem = f"{bad} chunks that it claims to have are wrong"
        if problem:
            # The whole file: a process that has it open sees that it is gone, but not a map changed.
            self._wrong("partial", f"partial/{name}", problem, lambda: remove(self._cache, entry))


def _check_places(index: LayerIndex) -> None:
    """Raise FormatError if the parts of the blob that an index names cannot be where it says."""
    if not 0 <= index.data_end <= index.toc_offset <= index.blob_size:
        raise FormatError(
            f"members to {index.data_end} and a table of contents at {index.toc_offset} are not in a"
            f" blob of {index.blob_size} bytes"
        )
    for number in range(index.member_count):
        member = index.member(number)
        if not 0 <= member.blob_offset < member.blob_end <= index.data_end:
            raise FormatError(f"member {number} is not in front of the table of contents")


def _contents(index: LayerIndex) -> Iterator[FileContent]:
    """All contents of an index; reads all of its nodes, so what is out of range shows."""
    for node in range(index.node_count):
        attributes = index.attributes(node)
        if stat.S_ISREG(attributes.mode) and attributes.size:
            yield index.file(node)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
