# SPDX-License-Identifier: Apache-2.0
"""Guesses from what readers had to wait for what they will want next, where no profile says it.

While a program starts, the network is idle most of the time: the program reads, waits for a round trip,
computes, and reads the next file. Two guesses fill the gaps, at a lower priority than any reader. Who
needs a second part of a file will need most of it (a shared library is relocated page by page). Who
needs several files of a directory will need its other small files (modules of a package). Both are
bounded, so that a wrong guess costs little.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable

from lazysnap.index.reader import LayerIndex
from lazysnap.layers.fetch import Plan

# A larger file is data, of which a program may want any part.
_WHOLE_FILE = 96 << 20
_SMALL_FILE = 1 << 20
_DIRECTORY = 6 << 20
_MISSES_IN_FILE = 2
_MISSES_IN_DIRECTORY = 3


class Guesser:
    """Guesses for one layer.

    Args:
        index: of the layer.
        add: takes up a plan.
    """

    def __init__(self, index: LayerIndex, add: Callable[[Plan], object]) -> None:
        self._index = index
        self._add = add
        self._files: dict[int, int] = {}
        self._directories: dict[int, int] = {}

    def missed(self, node: int) -> None:
        """A reader had to wait for a part of a file.

        Args:
            node: of the file.
        """
        misses = self._files.get(node, 0) + 1
        self._files[node] = misses
        file = self._index.file(node)
        if misses == _MISSES_IN_FILE and file.size <= _WHOLE_FILE:
            self._plan([node])
        if misses == 1:
            directory = self._index.parent(node)
            count = self._directories.get(directory, 0) + 1
            self._directories[directory] = count
            if count == _MISSES_IN_DIRECTORY:
                self._plan(self._small_files(directory))

    def _small_files(self, directory: int) -> Iterable[int]:
        left = _DIRECTORY
        for _, _, child in self._index.children(directory):
            attributes = self._index.attributes(child)
            if stat.S_ISREG(attributes.mode) and 0 < attributes.size <= _SMALL_FILE:
                left -= attributes.size
                if left < 0:
                    return
                yield child

    def _plan(self, nodes: Iterable[int]) -> None:
        members = set()
        for node in nodes:
            file = self._index.file(node)
            for i in range(file.first_chunk, file.first_chunk + file.chunk_count):
                member = self._index.chunk(i).member
                if member >= 0:
                    members.add(member)
        if members:
            self._add(Plan(sorted(members)))
