# SPDX-License-Identifier: Apache-2.0
"""Chooses what an operator has removed from a cache, and finds what crashes left in it.

A *leftover* is a file that nobody will use: one that was being written when its process ended, an
index that belongs to no mounted layer, a partial file that has become an object. A young file is
spared, as it may be in the making.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lazysnap.cache import Cache
from lazysnap.cache.inventory import Entry, entries
from lazysnap.paths import INDEX_TAIL

_BLOCK = 512
# Nothing takes so long to be written, or to be mounted once it has been.
_IN_THE_MAKING_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that is of no use.

    Attributes:
        name: below the cache.
        disk_bytes: what it takes on disk.
        why: what it is.
    """

    name: str
    disk_bytes: int
    why: str


def leftovers(cache: Cache, used_indexes: Iterable[str]) -> list[Leftover]:
    """All leftovers of a cache.

    Args:
        cache: where to look.
        used_indexes: names of the indexes that mounted layers need.

    Raises:
        OSError: a directory cannot be read.
    """
    used = set(used_indexes)
    found = list(_in(cache, cache.index, lambda entry, _: _index_leftover(entry.name, used)))
    found += _in(cache, cache.trees, lambda entry, _: _tree_leftover(entry.name, used))
    for number in range(256):
        for place in (cache.paths.objects, cache.paths.aside):
            found += _in(cache, f"{place}/{number:02x}", _object_leftover)
    return found + list(_in(cache, cache.partial, _partial_leftover(cache)))


def _index_leftover(name: str, used: set[str]) -> str:
    if ".new-" in name:
        return "unfinished index"
    if name in used or name.removesuffix(INDEX_TAIL) in used:
        return ""
    return f"{'tail' if name.endswith(INDEX_TAIL) else 'index'} of no mounted layer"


def _tree_leftover(name: str, used: set[str]) -> str:
    if ".new-" in name:
        return "unfinished tree"
    return "" if name.partition(".")[0] in used else "tree of no mounted layer"


def _object_leftover(entry: os.DirEntry[str], _: os.stat_result) -> str:
    return "unfinished object" if entry.name.startswith("new-") else ""


def _partial_leftover(cache: Cache) -> Callable[[os.DirEntry[str], os.stat_result], str]:
    def why(entry: os.DirEntry[str], _: os.stat_result) -> str:
        base, _dot, suffix = os.path.join(cache.partial, entry.name).rpartition(".")
        try:
            data = os.stat(base + ".data")
        except FileNotFoundError:
            return "map of no file" if suffix == "map" else ""
        return "has become an object" if data.st_nlink > 1 else ""

    return why


def _in(
    cache: Cache, directory: str, why: Callable[[os.DirEntry[str], os.stat_result], str]
) -> Iterator[Leftover]:
    latest = time.time() - _IN_THE_MAKING_SECONDS
    try:
        listing = os.scandir(directory)
    except FileNotFoundError:
        return
    with listing:
        for entry in listing:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                reason = why(entry, status)
                # Not the modification time, which may be a seal.
                if reason and status.st_ctime < latest:
                    name = os.path.relpath(entry.path, cache.root)
                    yield Leftover(name, status.st_blocks * _BLOCK, reason)


def remove_leftover(cache: Cache, leftover: Leftover) -> None:
    """Remove a leftover; one that is gone is no error."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(cache.root, leftover.name))


def choose(
    cache: Cache,
    *,
    everything: bool = False,
    older_than: float | None = None,
    to_size: int | None = None,
) -> list[Entry]:
    """The contents that are to go, oldest first.

    Args:
        cache: where to look.
        everything: all of them.
        older_than: those that were not used for so many seconds.
        to_size: those that were not used for longest, until the rest takes so many bytes on disk.

    Raises:
        OSError: a directory cannot be read.
    """
    found = sorted(entries(cache), key=lambda entry: entry.used_ns)
    count = len(found) if everything else 0
    if older_than is not None:
        latest = time.time_ns() - int(older_than * 1e9)
        count = max(count, sum(1 for entry in found if entry.used_ns < latest))
    if to_size is not None:
        excess = sum(entry.disk_bytes for entry in found) - to_size
        enough = 0
        while excess > 0:
            excess -= found[enough].disk_bytes
            enough += 1
        count = max(count, enough)
    return found[:count]
