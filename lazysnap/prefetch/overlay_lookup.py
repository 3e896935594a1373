# SPDX-License-Identifier: Apache-2.0
"""Finds files by path in the tree of an image, as overlayfs puts its layers together. Pure."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from typing import NamedTuple

from lazysnap.index.model import OPAQUE, WHITEOUT
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.links import Link, follow


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


def find_file(layers: Sequence[LayerIndex], path: bytes) -> Found | None:
    """The regular file that a path leads to; links are followed.

    Args:
        layers: of the image, the uppermost first.
        path: from the root of the image.
    """
    merged, real = _walk(layers, path)
    for layer, node in merged[:1]:
        if stat.S_ISREG(layers[layer].attributes(node).mode):
            return Found(layer, node, real)
    return None


def names(layers: Sequence[LayerIndex], path: bytes) -> set[bytes]:
    """The names in a directory, with those that are deleted; none if there is no such directory.

    Arguments are those of `find_file`.
    """
    merged, _ = _walk(layers, path)
    return {name for layer, node in merged for _, name, _ in layers[layer].children(node)}


def _walk(layers: Sequence[LayerIndex], path: bytes) -> tuple[_Merged, bytes]:
    """The file or directory that a path leads to, and its path without links."""

    def step(place: tuple[bytes, _Merged], name: bytes) -> tuple[bytes, _Merged] | Link | None:
        merged = _step(layers, place[1], name)
        if not merged:
            return None
        layer, node = merged[0]
        if stat.S_ISLNK(layers[layer].attributes(node).mode):
            return Link(layers[layer].readlink(node))
        # Below what is no directory nothing is found.
        return name, merged

    top = (b"", [(number, 0) for number in range(len(layers))])
    way = follow(path.split(b"/"), top, step)
    if way is None:
        return [], b""
    return way[-1][1], b"/".join(name for name, _ in way)


def _step(layers: Sequence[LayerIndex], directory: _Merged, name: bytes) -> _Merged:
    """The file or directory of a name in a merged directory."""
    found: _Merged = []
    for layer, node in directory:
        child = layers[layer].lookup(node, name)
        if child < 0:
            continue
        attributes = layers[layer].attributes(child)
        if attributes.flags & WHITEOUT:
            break
        if not stat.S_ISDIR(attributes.mode):
            return found or [(layer, child)]
        found.append((layer, child))
        if attributes.flags & OPAQUE:
            break
    return found
