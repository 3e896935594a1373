# SPDX-License-Identifier: Apache-2.0
"""Lists what is in the cache by looking at the directories: contents with their sizes and last uses.

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

_BLOCK = 512
# A time of last use that is further in the future is not one: the clock was wrong, or it is a seal.
_FUTURE_NANOSECONDS = 3600 * 1_000_000_000


class Kind(enum.Enum):
    """The kinds of contents."""

    OBJECT = "object"
    PARTIAL = "partial"


class Entry(NamedTuple):
    """One content of the cache.

    Attributes:
        used_ns: when it was last opened or written, to the hour; 0 if that is not known.
        disk_bytes: what it takes on disk.
        kind: which directory it is in.
        key: its name there.
        size: its length in bytes; for a partial file, of the complete one.
        inodes: files that it consists of.
    """

    used_ns: int
    disk_bytes: int
    kind: Kind
    key: bytes
    size: int
    inodes: int


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


def remove(cache: Cache, entry: Entry) -> None:
    """Remove a content; those who have it open can go on reading it."""
    if entry.kind is Kind.OBJECT:
        cache.objects.remove(entry.key)
        return
    base = os.path.join(cache.partial, entry.key.hex())
    for suffix in (".map", ".data"):
        with contextlib.suppress(OSError):
            os.unlink(base + suffix)
    cache.objects.note_removal()
