# SPDX-License-Identifier: Apache-2.0
"""Sees that somebody walks through a layer, as backups and searches do, and fetches ahead of the walk.

A walk opens one file after the other, near each other in the blob: about in its order, or in any order
within a directory. Once what it wants is there before it, the kernel opens files by itself, and neither
the network nor a shard has a part in that. Nobody tells how far a walk has come then: only that it goes
on, when it has to wait again at the edge of what was fetched. So what is fetched ahead doubles each time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from lazysnap.fetch.fetcher import Plan
from lazysnap.index.reader import LayerIndex

# Different files that are waited for, near each other, until that is a walk.
_STEPS = 8
# Walks of one layer that are followed at a time.
_WALKS = 8
# Near is what the network brings in so many seconds; and this is fetched ahead at first.
_NEAR_SECONDS = 0.05
# Compressed bytes.
_LEAST = 1 << 20
_STRIDE_MOST = 4 << 20
_AHEAD_MOST = 64 << 20
# Chunks of zeros at either end of a file that are passed over.
_ZEROS_MOST = 256
# As urgent as what profiles do not name can be, see `Plan.wanted_at`.
_AFTER_PROFILES = 1e12


@dataclass(slots=True, eq=False)
class _Walk:
    """One walk.

    Attributes:
        low: blob offset from which on files were waited for, or fetched ahead.
        high: blob offset up to which.
        steps: files that were waited for.
        ahead: compressed bytes that were fetched ahead the last time; 0: it is none yet.
    """

    low: int
    high: int
    steps: int = 0
    ahead: int = 0


class TreeWalks:
    """The walks through one layer.

    Args:
        index: of the layer.
        add: takes up a plan.
        bandwidth: tells bytes per second of the layer's host; 0 if unknown.
    """

    def __init__(
        self,
        index: LayerIndex,
        add: Callable[[Plan], object],
        bandwidth: Callable[[], float],
    ) -> None:
        self._index = index
        self._add = add
        self._bandwidth = bandwidth
        # The one that made a step last is the last one.
        self._walks: list[_Walk] = []
        self._node = -1

    def missed(self, node: int) -> None:
        """A reader had to wait for a part of a file.

        Args:
            node: of the file.
        """
        if node == self._node:
            return
        ends = self._ends(node)
        if ends is None:
            return
        self._node = node
        begin, end = ends
        fair = max(int(self._bandwidth() * _NEAR_SECONDS), _LEAST)
        walk = self._near(begin, end, min(fair, _STRIDE_MOST))
        walk.steps += 1
        if walk.steps < _STEPS:
            walk.low, walk.high = min(walk.low, begin), max(walk.high, end)
        elif not walk.ahead:
            walk.low, walk.high = min(walk.low, begin), max(walk.high, end)
            walk.ahead = fair
            self._fetch(walk, walk.low, walk.high + fair)
        elif begin < walk.low:
            walk.ahead = min(walk.ahead * 2, _AHEAD_MOST)
            self._fetch(walk, begin - walk.ahead, walk.low)
        elif begin >= walk.high - walk.ahead // 2:
            # Half of it is left to get more.
            walk.ahead = min(walk.ahead * 2, _AHEAD_MOST)
            self._fetch(walk, walk.high, max(walk.high, end) + walk.ahead)

    def _ends(self, node: int) -> tuple[int, int] | None:
        """Where in the blob a file begins and ends; without a look at all of its chunks."""
        content = self._index.file(node)
        numbers = range(content.first_chunk, content.first_chunk + content.chunk_count)
        members = [
            next((m for m in map(self._member, islice(some, _ZEROS_MOST)) if m >= 0), -1)
            for some in (numbers, reversed(numbers))
        ]
        if -1 in members:
            return None
        first, last = map(self._index.member, members)
        return first.blob_offset, last.blob_end

    def _member(self, chunk: int) -> int:
        return self._index.chunk(chunk).member

    def _near(self, begin: int, end: int, stride: int) -> _Walk:
        """The walk that a file is near of, or a new one."""
        for walk in reversed(self._walks):
            if walk.low - stride <= begin <= walk.high + stride:
                self._walks.remove(walk)
                break
        else:
            walk = _Walk(begin, end)
            del self._walks[: len(self._walks) + 1 - _WALKS]
        self._walks.append(walk)
        return walk

    def _fetch(self, walk: _Walk, low: int, high: int) -> None:
        """Fetch the members between two blob offsets for a walk."""
        walk.low, walk.high = min(walk.low, low), max(walk.high, high)
        if members := self._members(low, high):
            self._add(Plan(members, wanted_at=[_AFTER_PROFILES] * len(members)))

    def _members(self, low: int, high: int) -> range:
        """The members that begin between two blob offsets."""
        numbers = range(self._index.member_count)
        numbers = numbers[bisect_left(numbers, low, key=self._offset) :]
        return numbers[: bisect_left(numbers, high, key=self._offset)]

    def _offset(self, number: int) -> int:
        return self._index.member(number).blob_offset
