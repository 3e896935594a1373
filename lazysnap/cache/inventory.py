# SPDX-License-Identifier: Apache-2.0
"""Lists what is in the cache by looking at the directories: with its sizes and last uses.

There are *contents* of files, and *layer files*: indexes, with the tails of blobs, and images of trees.
Reads no content and checks nothing. Other processes add and remove while it looks, so what it names
may be gone already.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from lazysnap.cache import Cache
from lazysnap.paths import INDEX_TAIL, CacheDirectory

_BLOCK = 512
# A time of last use that is further in the future is not one: the clock was wrong, or it is a seal.
_FUTURE_NANOSECONDS = 3600 * 1_000_000_000


class Kind(enum.Enum):
    """The kinds of what the cache holds: two of contents, and two of layer files."""

    OBJECT = "object"
    PARTIAL = "partial"
    INDEX = "index"
    TREE = "tree"


class Entry(NamedTuple):
    """One content of the cache, or layer file.

    Attributes:
        used_ns: when it was last opened or written, to the hour; 0 if that is not known.
        disk_bytes: what it takes on disk.
        kind: which directory it is in.
        key: its name there; raw if it is a digest.
        size: its length in bytes; for a partial file, of the complete one.
        inodes: files that it consists of.
    """

    used_ns: int
    disk_bytes: int
    kind: Kind
    key: bytes
    size: int
    inodes: int

    @property
    def name(self) -> str:
        """Its name as text."""
        layer_file = self.kind in (Kind.INDEX, Kind.TREE)
        return os.fsdecode(self.key) if layer_file else self.key.hex()


def entries(cache: Cache) -> Iterator[Entry]:
    """All contents, in no order.

    Raises:
        OSError: a directory of the cache cannot be read.
    """
    latest = time.time_ns() + _FUTURE_NANOSECONDS
    for key, status in cache.objects:
        used = status.st_atime_ns if status.st_atime_ns <= latest else 0
        yield Entry(
            used_ns=used,
            disk_bytes=status.st_blocks * _BLOCK,
            kind=Kind.OBJECT,
            key=key,
            size=status.st_size,
            inodes=1,
        )
    with os.scandir(cache.partial) as found:
        for item in found:
            name, _, suffix = item.name.partition(".")
            with contextlib.suppress(ValueError, OSError):
                key = bytes.fromhex(name)
                if suffix != "data" or len(key) != 32:
                    continue
                status = item.stat(follow_symlinks=False)
                times = (status.st_atime_ns, status.st_mtime_ns)
                used = max(t if t <= latest else 0 for t in times)
                # The map is one byte for each chunk: next to nothing.
                blocks = status.st_blocks * _BLOCK
                yield Entry(
                    used_ns=used,
                    disk_bytes=blocks,
                    kind=Kind.PARTIAL,
                    key=key,
                    size=status.st_size,
                    inodes=2,
                )


def layer_files(cache: CacheDirectory) -> list[Entry]:
    """All layer files, in no order: an entry for each index with its tail, and for each image of a tree.

    What is being written is left out.

    Raises:
        OSError: a directory of the cache cannot be read.
    """
    found: dict[tuple[Kind, str], Entry] = {}
    now = time.time_ns()
    for kind, directory in ((Kind.INDEX, cache.indexes), (Kind.TREE, cache.trees)):
        with os.scandir(directory) as listing:
            for item in listing:
                if ".new-" in item.name:
                    continue
                name = item.name.removesuffix(INDEX_TAIL)
                with contextlib.suppress(OSError):
                    status = item.stat(follow_symlinks=False)
                    other = found.get((kind, name)) or _nothing(kind, name)
                    # Rather too late than too early: somebody may be about to use it.
                    used = min(max(status.st_atime_ns, status.st_mtime_ns), now)
                    found[kind, name] = other._replace(
                        used_ns=max(used, other.used_ns),
                        # Repositories that have the same layer share one file under several names.
                        disk_bytes=other.disk_bytes
                        + status.st_blocks * _BLOCK // max(status.st_nlink, 1),
                        size=other.size + status.st_size,
                        inodes=other.inodes + 1,
                    )
    return list(found.values())


def _nothing(kind: Kind, name: str) -> Entry:
    key = os.fsencode(name)
    return Entry(used_ns=0, disk_bytes=0, kind=kind, key=key, size=0, inodes=0)


def remove(cache: Cache, entry: Entry) -> None:
    """Remove a content or a layer file; those who have it open can go on reading it."""
    if entry.kind is Kind.OBJECT:
        cache.objects.remove(entry.key)
        return
    if entry.kind is Kind.PARTIAL:
        base = os.path.join(cache.partial, entry.name)
        paths = [base + ".map", base + ".data"]
    elif entry.kind is Kind.INDEX:
        # Whoever finds an index makes neither again.
        paths = [cache.paths.index(entry.name), cache.paths.tail(entry.name)]
    else:
        paths = [os.path.join(cache.trees, entry.name)]
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
    cache.objects.note_removal()
