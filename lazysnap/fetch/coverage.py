# SPDX-License-Identifier: Apache-2.0
"""How much of a layer is in the cache, found by looking at the disk; runs in a thread."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass

from lazysnap.cache import Cache
from lazysnap.cache.partial import PRESENT, read_map
from lazysnap.index.model import FileContent
from lazysnap.index.reader import LayerIndex


@dataclass(frozen=True, slots=True)
class LocalShare:
    """The share of a layer that is in the cache.

    Attributes:
        files: complete files.
        all_files: files with any content.
        bytes: of the complete files, and of the chunks that are there of others.
    """

    files: int
    all_files: int
    bytes: int


def is_complete(index: LayerIndex, cache: Cache) -> bool:
    """Whether all of a layer's files are in the cache; stops at the first that is not."""
    return all(_present(index, file, cache) == file.size for file in _files(index))


def is_empty(index: LayerIndex, cache: Cache) -> bool:
    """Whether the layer has content and the cache has none of it; stops at the first it has."""
    sizes = [file.size for file in _files(index)]
    return bool(sizes) and not any(_present(index, file, cache) for file in _files(index))


def local_share(index: LayerIndex, cache: Cache) -> LocalShare:
    """Look at every file of a layer."""
    complete = everything = size = 0
    for file in _files(index):
        present = _present(index, file, cache)
        everything += 1
        complete += present == file.size
        size += present
    return LocalShare(complete, everything, size)


def _files(index: LayerIndex) -> Iterator[FileContent]:
    for mode, _, _, _, _, size, _, _, first, count, _, keys, _ in index.rows():
        if size and stat.S_ISREG(mode):
            yield FileContent(size, first, count, *index.content_keys(first, count, keys))


def _present(index: LayerIndex, file: FileContent, cache: Cache) -> int:
    """How many bytes of a file are in the cache, as far as names and maps tell."""
    if cache.objects.exists(file.object_key, file.size):
        return file.size
    if file.partial_key is None:
        return 0
    chunk_map = read_map(cache.partial, file.partial_key)
    if chunk_map is None:
        return 0
    chunk_map = chunk_map.ljust(file.chunk_count, b"\0")
    size = 0
    for number in range(file.chunk_count):
        chunk = index.chunk(file.first_chunk + number)
        if chunk.member < 0 or chunk_map[number] == PRESENT:
            size += chunk.size
    return size
