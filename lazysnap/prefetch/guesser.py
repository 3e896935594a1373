# SPDX-License-Identifier: Apache-2.0
"""Guesses from what readers had to wait for what they will want next, where no profile says it.

While a program starts, the network is idle most of the time: the program reads, waits for a round trip,
computes, and reads the next file. Guesses fill the gaps, at a lower priority than any reader, the likelier
ones first:

- Who needs one of a directory's small files will need others of the same kind (modules of a package).
- Who needs a module of a Python package will need much of the package, but not its tests.
- Who needs a second part of a file will need most of it (a program is relocated page by page).

None of that holds for libraries and programs: many of them share a directory and have nothing to do with
each other, and of a large library most starts need little. All is bounded, so that a wrong guess costs
little.
"""

from __future__ import annotations

import enum
import os.path
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.members import filled, of_file
from lazysnap.index.reader import LayerIndex

# A larger file is data, of which a program may want any part.
_WHOLE_FILE = 96 << 20
_WHOLE_LIBRARY = 16 << 20
_SMALL_FILE = 4 << 20
# Compressed bytes of guesses.
_NEAR = 1 << 20
_DIRECTORY = 6 << 20
_PACKAGE = 12 << 20
# Files that are looked at for one guess, however many a directory has: nobody is served meanwhile.
_NEAR_MOST = 1024
_CHILDREN_MOST = 2048
_BELOW_MOST = 8192
# Packages that a package is in, one in the other.
_PACKAGES_MOST = 64
# A file of more chunks is not looked at: even of 96 MiB the usual ones have fewer than half of it.
_CHUNKS_MOST = 4096
_MISSES_IN_FILE = 2
_MISSES_IN_DIRECTORY = 2
# A gap in the blob that is smaller than this is fetched too: its bytes cost less than another request.
_GAP = 64 << 10
# Guesses are wanted after everything that a profile names, see `Plan.wanted_at`.
_AFTER_PROFILES = 1e12
_EXECUTABLE = 0o111
_PACKAGE_MARK = b"__init__.py"
_COMPILED = b"__pycache__"
_MODULES = (b".py", b".pyc")
_TESTS = (b"tests", b"test")


class Guess(enum.IntEnum):
    """Why something is guessed, the likeliest first."""

    LINKED = 0
    DIRECTORY = 1
    PACKAGE = 2
    REST = 3


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
        self._packages: set[int] = set()
        self._expected: frozenset[int] = frozenset()

    def expect(self, nodes: Iterable[int]) -> None:
        """Files that a profile names: whoever waits for one says nothing that is not known."""
        self._expected = self._expected.union(nodes)

    def missed(self, node: int) -> None:
        """A reader had to wait for a part of a file.

        Args:
            node: of the file.
        """
        if node in self._expected:
            return
        misses = self._files.get(node, 0) + 1
        self._files[node] = misses
        if misses == _MISSES_IN_FILE:
            file = self._index.file(node)
            most = _WHOLE_LIBRARY if is_library(self._index.name(node)) else _WHOLE_FILE
            if file.size <= most and file.chunk_count <= _CHUNKS_MOST:
                self._plan(Guess.REST, [node])
        if misses == 1 and not self._stands_alone(node):
            directory = self._index.parent(node)
            self._missed_in_directory(directory, node)
            self._missed_in_package(directory, node)

    def _stands_alone(self, node: int) -> bool:
        """Whether a file is a program or a library, which say nothing of their neighbours."""
        name = self._index.name(node)
        if is_library(name):
            return True
        return not name.endswith(b".so") and bool(self._index.attributes(node).mode & _EXECUTABLE)

    def _missed_in_directory(self, directory: int, node: int) -> None:
        misses = self._directories.get(directory, 0) + 1
        self._directories[directory] = misses
        if misses > _MISSES_IN_DIRECTORY:
            return
        index = self._index
        kind = _kind(index.name(node))
        if misses == 1:
            near = (other for other in self._near(node) if _kind(index.name(other)) == kind)
            self._plan(Guess.DIRECTORY, self._small(near, _NEAR))
        else:
            children = islice(index.children(directory), _CHILDREN_MOST)
            alike = (child for _, name, child in children if _kind(name) == kind)
            self._plan(Guess.DIRECTORY, self._small(alike, _DIRECTORY))

    def _near(self, node: int) -> Iterator[int]:
        """A file and its neighbours by name, the nearest first; their numbers follow each other."""
        directory = self._index.parent(node)
        yield node
        for distance in range(1, _NEAR_MOST // 2):
            for other in (node - distance, node + distance):
                if 0 < other < self._index.node_count and self._index.parent(other) == directory:
                    yield other

    def _missed_in_package(self, directory: int, node: int) -> None:
        package = self._package(directory)
        if package is None or package in self._packages:
            return
        self._packages.add(package)
        kind = _kind(self._index.name(node))
        kinds = (kind, b".so") if kind in _MODULES else (*_MODULES, b".so")
        self._plan(Guess.PACKAGE, self._small(self._below(package, kinds), _PACKAGE))

    def _package(self, directory: int) -> int | None:
        """The outermost Python package that a directory is in; None if it is in none."""
        index = self._index
        if directory and index.name(directory) == _COMPILED:
            directory = index.parent(directory)
        package = None
        for _ in range(_PACKAGES_MOST):
            if not directory or index.lookup(directory, _PACKAGE_MARK) < 0:
                break
            package = directory
            directory = index.parent(directory)
        return package

    def _below(self, top: int, kinds: tuple[bytes, ...]) -> Iterator[int]:
        """The files of some kinds in a tree, but for tests; the nearest to its top first."""
        directories = [top]
        left = _BELOW_MOST
        for directory in directories:
            for _, name, child in islice(self._index.children(directory), left):
                left -= 1
                if stat.S_ISDIR(self._index.attributes(child).mode):
                    if name not in _TESTS:
                        directories.append(child)
                elif _kind(name) in kinds:
                    yield child

    def _small(self, nodes: Iterable[int], left: int) -> Iterator[int]:
        """The first of some files that are not large, up to so many compressed bytes."""
        chunks = _CHUNKS_MOST * 2
        for node in nodes:
            attributes = self._index.attributes(node)
            if stat.S_ISREG(attributes.mode) and 0 < attributes.size <= _SMALL_FILE:
                chunks -= self._index.file(node).chunk_count
                if chunks < 0:
                    return
                for member in map(self._index.member, of_file(self._index, node)):
                    left -= member.blob_end - member.blob_offset
                if left < 0:
                    return
                yield node

    def _plan(self, guess: Guess, nodes: Iterable[int]) -> None:
        wanted = {member for node in nodes for member in of_file(self._index, node)}
        members = list(filled(self._index, sorted(wanted), _GAP))
        if members:
            self._add(Plan(members, wanted_at=wanted_at(guess, len(members))))


def wanted_at(guess: Guess, count: int) -> Sequence[float]:
    """For a plan of guesses, when each of them will be needed, see `Plan`."""
    return [_AFTER_PROFILES + guess] * count


def is_library(name: bytes) -> bool:
    """Whether a file's name is one of a shared library that programs link to, not one of a plugin."""
    return b".so." in name or (name.startswith(b"lib") and name.endswith(b".so"))


def _kind(name: bytes) -> bytes:
    """The kind of files that have such a name."""
    return b".so.*" if is_library(name) else os.path.splitext(name)[1]
