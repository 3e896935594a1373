# SPDX-License-Identifier: Apache-2.0
"""Which members of a layer lie together, and which are in the cache already.

Knows nothing of flights or requests. To look opens, creates and evicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lazysnap.cache import Cache
from lazysnap.cache.partial import claims
from lazysnap.index.reader import LayerIndex

# More than this between two members, as tables of contents may leave, is not fetched with them.
_GAP = 256 << 10
# No more members than this are fetched only because they lie between others.
_BETWEEN = 64


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


def filled(index: LayerIndex, members: Sequence[int], gap: int) -> Iterator[int]:
    """Ascending numbers, with those between them that cost less than another request.

    Args:
        index: of the layer.
        members: that are wanted, ascending.
        gap: compressed bytes that may lie between two of them.
    """
    previous = -1
    for number in members:
        if (
            0 <= previous < number - 1 <= previous + _BETWEEN
            and index.member(number).blob_offset - index.member(previous).blob_end <= gap
        ):
            yield from range(previous + 1, number)
        yield number
        previous = number


def of_range(index: LayerIndex, node: int, offset: int, size: int) -> Iterator[int]:
    """The members that a range of a regular file is in, in order; some perhaps repeatedly.

    Args:
        index: of the layer.
        node: of the file.
        offset: where the range begins, in bytes.
        size: in bytes; may reach beyond the end of the file.
    """
    file = index.file(node)
    end = min(offset + size, file.size)
    if 0 <= offset < end:
        first = last = file.first_chunk
        if file.chunk_count > 1:
            first, last = index.chunk_at(node, offset), index.chunk_at(node, end - 1)
        for i in range(first, last + 1):
            member = index.chunk(i).member
            if member >= 0:
                yield member


def of_file(index: LayerIndex, node: int) -> Iterator[int]:
    """The members that a regular file is in, in order; some perhaps repeatedly."""
    return of_range(index, node, 0, index.file(node).size)


def present(cache: Cache, index: LayerIndex, number: int) -> bool:
    """Whether all chunks of a member are in the cache, as far as can be told without reading."""
    for i in index.member_chunks(number):
        file = index.file(index.owner(i))
        # Not through the table of contents: to look must open, create and evict nothing.
        if not cache.objects.exists(file.object_key, file.size) and (
            file.partial_key is None
            or not claims(cache.partial, file.partial_key, i - file.first_chunk)
        ):
            return False
    return True
