# SPDX-License-Identifier: Apache-2.0
"""Attributes of directories that a layer leaves out, from the layers below it.

Builders such as umoci and kaniko omit unchanged parent directories from a layer. An unpack creates
them and copies owner, mode, times and xattrs (but `trusted.*`) from the nearest lower layer that has
the directory; symbolic links on the way are followed within that layer, and anything that is not a
directory there, such as a whiteout, ends the search (containerd pkg/archive/tar.go, mkparent). Here the
same is done for a layer that is not unpacked. Reads lower layers from their indexes, or from disk.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Protocol

from lazysnap.index.model import OPAQUE
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.links import Link, Steps, follow
from lazysnap.layers.slots import Inherited
from lazysnap.layers.view import LayerView

# What one layer may have us search: about ten seconds.
_STEPS_MOST = 5_000_000


class LowerTree(Protocol):
    """The tree of one lower layer; paths are tuples of names without links in them."""

    def mode(self, path: tuple[bytes, ...]) -> int | None:
        """Type and permissions; None if there is nothing."""
        ...

    def readlink(self, path: tuple[bytes, ...]) -> bytes:
        """Target of a symbolic link."""
        ...

    def describe(self, path: tuple[bytes, ...], node: int) -> Inherited:
        """The attributes of a directory, for the node that inherits them."""
        ...


class ViewTree:
    """The tree of a lazily mounted layer."""

    def __init__(self, view: LayerView) -> None:
        self._view = view

    def _node(self, path: tuple[bytes, ...]) -> int:
        node = 0
        for name in path:
            node = self._view.index.lookup(node, name)
            if node < 0:
                break
        return node

    def mode(self, path: tuple[bytes, ...]) -> int | None:
        """Type and permissions; None if there is nothing."""
        node = self._node(path)
        return None if node < 0 else self._view.attributes(node).mode

    def readlink(self, path: tuple[bytes, ...]) -> bytes:
        """Target of a symbolic link."""
        return self._view.index.readlink(self._node(path))

    def describe(self, path: tuple[bytes, ...], node: int) -> Inherited:
        """The attributes of a directory."""
        own = self._node(path)
        found = self._view.attributes(own)
        xattrs = [(k, v) for k, v in self._view.xattrs(own) if not k.startswith(b"trusted.")]
        return Inherited(
            node=node,
            mode=stat.S_IMODE(found.mode),
            uid=found.uid,
            gid=found.gid,
            mtime_ns=found.mtime_ns,
            xattrs=xattrs,
        )


class DirectoryTree:
    """The tree of an unpacked layer.

    Args:
        root: its directory.
    """

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)

    def _path(self, path: tuple[bytes, ...]) -> bytes:
        return b"/".join((self._root, *path))

    def mode(self, path: tuple[bytes, ...]) -> int | None:
        """Type and permissions; None if there is nothing."""
        try:
            return os.lstat(self._path(path)).st_mode
        except OSError:
            return None

    def readlink(self, path: tuple[bytes, ...]) -> bytes:
        """Target of a symbolic link."""
        return os.readlink(self._path(path))

    def describe(self, path: tuple[bytes, ...], node: int) -> Inherited:
        """The attributes of a directory."""
        full = self._path(path)
        found = os.lstat(full)
        names = [os.fsencode(name) for name in os.listxattr(full, follow_symlinks=False)]
        xattrs = [
            (name, os.getxattr(full, name, follow_symlinks=False))
            for name in names
            if not name.startswith(b"trusted.")
        ]
        return Inherited(
            node=node,
            mode=stat.S_IMODE(found.st_mode),
            uid=found.st_uid,
            gid=found.st_gid,
            mtime_ns=found.st_mtime_ns,
            xattrs=xattrs,
        )


def inherit(index: LayerIndex, lowers: Sequence[LowerTree]) -> list[Inherited]:
    """The attributes that the left-out directories of a layer take over.

    Args:
        index: of the layer.
        lowers: the layers below it, nearest first.

    Returns:
        An entry for each left-out directory that some lower layer has.

    Raises:
        OSError: an unpacked lower layer cannot be read.
        TooManySteps: links and left-out directories were made to keep us busy.
    """
    found = []
    steps = Steps(_STEPS_MOST)
    for node, path in index.implied():
        names = tuple(path.split(b"/"))
        for lower in lowers:
            place = _resolve(lower, names, steps)
            if place is None:
                continue
            mode = lower.mode(place)
            if mode is not None and stat.S_ISDIR(mode):
                found.append(lower.describe(place, node))
            break
    return found


def hides_something(index: LayerIndex, lowers: Sequence[LowerTree]) -> bool:
    """Whether a directory that the layer marks opaque exists in a layer below it.

    Builders mark every new directory, as overlay does when it creates one. Where nothing is below,
    the mark says nothing, and a layer without marks and xattrs is read much faster.

    Args:
        index: of the layer.
        lowers: the layers below it.

    Raises:
        TooManySteps: the layer has too many directories for that.
    """
    steps = Steps(_STEPS_MOST)
    left: list[tuple[int, tuple[bytes, ...], Sequence[LowerTree]]] = [(0, (), lowers)]
    while left:
        node, path, below = left.pop()
        if index.attributes(node).flags & OPAQUE:
            return True
        for _, name, child in index.children(node):
            steps.take()
            if stat.S_ISDIR(index.attributes(child).mode):
                place = (*path, name)
                steps.take(len(below) * len(place))
                merged = [tree for tree in below if _is_directory(tree, place)]
                if merged:
                    left.append((child, place, merged))
    return False


def _is_directory(tree: LowerTree, path: tuple[bytes, ...]) -> bool:
    mode = tree.mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _resolve(tree: LowerTree, names: Sequence[bytes], steps: Steps) -> tuple[bytes, ...] | None:
    """Follow links within a tree; None if the path does not exist there."""

    def step(place: tuple[bytes, ...], name: bytes) -> tuple[bytes, ...] | Link | None:
        below = (*place, name)
        steps.take(len(below))
        mode = tree.mode(below)
        if mode is None:
            return None
        return Link(tree.readlink(below)) if stat.S_ISLNK(mode) else below

    top: tuple[bytes, ...] = ()
    way = follow(names, top, step, steps)
    return None if way is None else way[-1]
