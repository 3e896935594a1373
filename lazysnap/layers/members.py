# SPDX-License-Identifier: Apache-2.0
"""Which members of a layer lie together, and which are in the cache already.

Knows nothing of flights or requests. To look opens, creates and evicts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from lazysnap.cache import Cache
from lazysnap.index.reader import LayerIndex

# More than this between two members, as tables of contents may leave, is not fetched with them.
_GAP = 256 << 10


def adjoin(index: LayerIndex, member: int, following: int) -> bool:
    """Whether one request for two members fetches little else."""
    return (
        following == member + 1
        and index.member(following).blob_offset - index.member(member).blob_end <= _GAP
    )


def runs(index: LayerIndex, members: Sequence[int]) -> list[list[int]]:
    """Split ascending numbers into runs that are worth one request each."""
    found: list[list[int]] = []
    for number in members:
        if found and adjoin(index, found[-1][-1], number):
            found[-1].append(number)
        else:
            found.append([number])
    return found


def present(cache: Cache, index: LayerIndex, number: int) -> bool:
    """Whether all chunks of a member are in the cache, as far as can be told without reading."""
    for i in index.member_chunks(number):
        file = index.file(index.owner(i))
        # Not through the table of contents: to look must open, create and evict nothing.
        if not cache.objects.exists(file.object_key, file.size) and (
            file.partial_key is None
            or not _claimed(cache.partial, file.partial_key, i - file.first_chunk)
        ):
            return False
    return True


def _claimed(directory: str, key: bytes, number: int) -> bool:
    """Whether the map of a partial file says that a chunk is there; see `PartialFile`."""
    try:
        fd = os.open(os.path.join(directory, key.hex() + ".map"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.pread(fd, 1, number) == b"\1"
    except OSError:
        return False
    finally:
        os.close(fd)
