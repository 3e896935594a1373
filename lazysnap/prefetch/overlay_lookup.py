# SPDX-License-Identifier: Apache-2.0
"""Finds files by path in the tree of an image, as overlayfs puts its layers together. Pure.

The images are not trusted: each search has a budget, and where a directory is, is remembered.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from lazysnap.index.model import OPAQUE, WHITEOUT
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.links import Link, Steps, follow, follow_on

# Names of one directory in one layer that are looked at.
_NAMES_MOST = 8192
# Directories and files that are remembered; paths that are longer than this are not.
_KNOWN_MOST = 4096
_KNOWN_PATH = 256


class Found(NamedTuple):
    """A regular file of an image.

    Attributes:
        layer: position of its layer.
        node: its number in that layer's index.
        path: without links in it.
    """

    layer: int
    node: int
    path: bytes


# Of one name in each layer that has it, position and node; several only of a directory.
_Merged = list[tuple[int, int]]
# The name of a file or directory, and where it is.
_Place = tuple[bytes, _Merged]


class OverlayTree:
    """The tree of an image.

    Args:
        layers: of the image, the uppermost first.
    """

    def __init__(self, layers: Sequence[LayerIndex]) -> None:
        self._layers = layers
        self._top: list[_Place] = [(b"", [(number, 0) for number in range(len(layers))])]
        self._directories: dict[bytes, list[_Place] | None] = {}
        self._files: dict[bytes, Found | None] = {}

    def find_file(self, path: bytes, steps: Steps) -> Found | None:
        """The regular file that a path leads to; links are followed.

        Args:
            path: from the root of the image.
            steps: of which the search takes some.

        Raises:
            TooManySteps: the budget is used up.
        """
        if path in self._files:
            return self._files[path]
        found = self._find(path, steps)
        if len(path) <= _KNOWN_PATH:
            if len(self._files) >= _KNOWN_MOST:
                self._files.clear()
            self._files[path] = found
        return found

    def names(self, path: bytes, steps: Steps) -> set[bytes]:
        """The names in a directory, with those that are deleted; not all if there are very many.

        Arguments are those of `find_file`. None if there is no such directory.
        """
        found: set[bytes] = set()
        way = self._directory(path, steps)
        for layer, node in way[-1][1] if way else ():
            children = islice(self._layers[layer].children(node), _NAMES_MOST)
            found.update(name for _, name, _ in children)
        return found

    def _find(self, path: bytes, steps: Steps) -> Found | None:
        directory, _, name = path.rpartition(b"/")
        way = self._directory(directory, steps)
        if way is not None:
            way = follow_on(way, [name], lambda place, name: self._step(place, name, steps), steps)
        for layer, node in way[-1][1][:1] if way else ():
            if stat.S_ISREG(self._layers[layer].attributes(node).mode):
                return Found(layer, node, b"/".join(name for name, _ in way or ()))
        return None

    def _directory(self, path: bytes, steps: Steps) -> list[_Place] | None:
        """The way to what a path leads to, which may be no directory: then nothing is below."""
        if path in self._directories:
            return self._directories[path]
        names = path.split(b"/")
        way = follow(names, self._top[0], lambda place, name: self._step(place, name, steps), steps)
        if len(path) <= _KNOWN_PATH:
            if len(self._directories) >= _KNOWN_MOST:
                self._directories.clear()
            self._directories[path] = way
        return way

    def _step(self, place: _Place, name: bytes, steps: Steps) -> _Place | Link | None:
        merged = self._merge(place[1], name, steps)
        if not merged:
            return None
        layer, node = merged[0]
        if stat.S_ISLNK(self._layers[layer].attributes(node).mode):
            return Link(self._layers[layer].readlink(node))
        # Below what is no directory nothing is found.
        return name, merged

    def _merge(self, directory: _Merged, name: bytes, steps: Steps) -> _Merged:
        """The file or directory of a name in a merged directory."""
        found: _Merged = []
        for layer, node in directory:
            steps.take()
            child = self._layers[layer].lookup(node, name)
            if child < 0:
                continue
            attributes = self._layers[layer].attributes(child)
            if attributes.flags & WHITEOUT:
                break
            if not stat.S_ISDIR(attributes.mode):
                return found or [(layer, child)]
            found.append((layer, child))
            if attributes.flags & OPAQUE:
                break
        return found
