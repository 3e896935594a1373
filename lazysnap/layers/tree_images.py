# SPDX-License-Identifier: Apache-2.0
"""Images of layers' trees in `cache/trees`: made once, checked before each use.

A layer of which nothing is left out has one image, whose name is that of its index. The attributes
of directories that it leaves out depend on the layers below; each such place has an image of its own, a
copy of the first with other attributes. An image is not synced when it is written: it ends with a
checksum, and what is torn by a power cut is made again. Does not mount anything. All functions block.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import msgspec

from lazysnap import log
from lazysnap.cache import Cache
from lazysnap.erofs.image import build
from lazysnap.erofs.trailer import overwrite, read_trailer
from lazysnap.errors import FormatError
from lazysnap.layers.slots import Inherited
from lazysnap.layers.tree_image_file import read_tree, write_tree
from lazysnap.layers.view import open_index

_log = log.get(__name__)
# Another writer gives other images: a part of the name.
_VERSION = 1
_NESTED_OPAQUE = b"trusted.overlay.overlay.opaque"


def tree_name(index_name: str, inherited: Sequence[Inherited] = (), *, nested: bool = False) -> str:
    """The name of an image.

    Args:
        index_name: of the layer's index.
        inherited: attributes of directories that the layer leaves out.
        nested: as `ensure_nested_tree` makes it.
    """
    name = f"{index_name}.{_VERSION}" + "-nested" * nested
    if not inherited:
        return name
    place = msgspec.msgpack.encode(list(inherited))
    return f"{name}-{hashlib.sha256(place).hexdigest()[:32]}"


def ensure_nested_tree(cache: Cache, index_name: str) -> str:
    """As `ensure_tree`, for an overlay of this layer alone that is below another overlay.

    The marks of opaque directories are for the upper one: each overlay takes one prefix away from such
    names (Linux 6.7, Documentation/filesystems/overlayfs.rst, "Nesting overlayfs mounts").
    """
    path = os.path.join(cache.trees, tree_name(index_name, nested=True))
    if _read(path) is None:
        index = open_index(cache.paths.index(index_name))
        write_tree(path, build(index, opaque_xattr=_NESTED_OPAQUE))
    return path


def ensure_tree(cache: Cache, index_name: str, inherited: Sequence[Inherited] = ()) -> str:
    """Make sure that the image of a tree is there and whole.

    Args:
        cache: that has the layer's index.
        index_name: of the layer's index.
        inherited: attributes of directories that the layer leaves out.

    Returns:
        Its path.

    Raises:
        FormatError: the tree has something that such an image cannot hold.
        Internal: the index or the disk cannot be used.
    """
    path = os.path.join(cache.trees, tree_name(index_name, inherited))
    if _read(path) is not None:
        return path
    base = None
    # Without anything inherited that would be the same file again; xattrs need room in the image.
    if inherited and not any(entry.xattrs for entry in inherited):
        base = _read(os.path.join(cache.trees, tree_name(index_name)))
    if base is not None:
        image = _patched(base, inherited)
    else:
        index = open_index(cache.paths.index(index_name))
        image = build(index, inherited=inherited)
    write_tree(path, image)
    return path


def _read(path: str) -> bytes | None:
    """A stored image, or None if there is none that is whole."""
    try:
        image = read_tree(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("image of a tree is made anew", path=path, error=error)
        return None
    if image is None:
        _log.warning("image of a tree is damaged, it is made anew", path=path)
    return image


def _patched(image: bytes, inherited: Sequence[Inherited]) -> bytearray:
    places = read_trailer(image)
    copy = bytearray(image)
    for entry in inherited:
        try:
            offset = places[entry.node]
        except KeyError as error:
            raise FormatError(f"directory {entry.node} is not one that is left out") from error
        for at, data in overwrite(
            offset, mode=entry.mode, uid=entry.uid, gid=entry.gid, mtime_ns=entry.mtime_ns
        ):
            copy[at : at + len(data)] = data
    return copy
