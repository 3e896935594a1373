# SPDX-License-Identifier: Apache-2.0
"""The store view of a shard, for an additional layer store: layers by image and digest.

`layers/<base64 of the reference>/<digest>` has `diff`, which is the layer's directory, `info` and
`blob`. Inode numbers are computed, as everywhere in a shard: that of an image's directory from its name,
the others from the slot. For a name that is not known, the store's daemon is asked, which mounts the layer
if it can. Knows nothing of FUSE but its inode numbers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import OrderedDict

import trio

from lazysnap import channel, log
from lazysnap.digest import Digest
from lazysnap.errors import FormatError, LazysnapError, NotFound
from lazysnap.layers.store_names import NamedLayer, list_names, read_name
from lazysnap.paths import Root

_log = log.get(__name__)
NAME = b"layers"
_VIEW = 1 << 61
_IMAGE = 1 << 60
_SLOT_MASK = (1 << 28) - 1
ROOT = _VIEW | 1
"""Inode of the directory with a directory for each image."""
LAYER, INFO, BLOB = 1, 2, 3
"""What an inode of a named layer is: its directory, or one of the two files in it."""
DIFF_NAME = b"diff"
FILES = {b"info": INFO, b"blob": BLOB}
# A registry may be slow; then the client pulls the layer as usual.
_FIND_SECONDS = 60.0
_NOTE_SECONDS = 5.0
_MOST_IMAGES = 10_000
_LONGEST_REFERENCE = 4096


def is_named(inode: int) -> bool:
    """Whether an inode belongs to this view."""
    return inode >> 61 == 1


def is_image(inode: int) -> bool:
    """Whether an inode of this view is the directory of an image."""
    return bool(inode & _IMAGE)


def inode_of(slot: int, what: int) -> int:
    """The inode number of `LAYER`, `INFO` or `BLOB` of a slot."""
    return _VIEW | slot << 32 | what


def slot_of(inode: int) -> tuple[int, int]:
    """The slot of an inode of a named layer, and what it is."""
    return inode >> 32 & _SLOT_MASK, inode & (1 << 32) - 1


def image_inode(reference: str) -> int:
    """The inode number of an image's directory."""
    number = int.from_bytes(hashlib.sha256(reference.encode()).digest()[:8], "big")
    return _VIEW | number & (_IMAGE - 1) | _IMAGE


class StoreView:
    """What the names of an additional layer store mean.

    Args:
        root: lazysnap's root directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        # These are not forgotten, as clients may hold their directories.
        self._images: OrderedDict[int, str] = OrderedDict()
        self._layers: dict[tuple[str, str], NamedLayer] = {}
        self._by_slot: dict[int, NamedLayer] = {}
        for slot in list_names(root):
            try:
                self._add(read_name(root, slot))
            except LazysnapError as error:
                _log.error("a name cannot be used", slot=slot, error=error)

    def _add(self, name: NamedLayer) -> None:
        self._layers[name.reference, name.digest] = name
        self._by_slot[name.slot] = name
        self._images[image_inode(name.reference)] = name.reference

    def image(self, name: bytes) -> int | None:
        """The inode of the directory of an image; None if the name is not base64 of a reference."""
        try:
            reference = base64.b64decode(name, validate=True).decode()
        except (binascii.Error, ValueError):
            return None
        if not reference or len(reference) > _LONGEST_REFERENCE:
            return None
        inode = image_inode(reference)
        self._images[inode] = reference
        self._images.move_to_end(inode)
        while len(self._images) > _MOST_IMAGES + len(self._by_slot):
            self._images.popitem(last=False)
        return inode

    def known(self, inode: int) -> bool:
        """Whether the image of a directory is known; otherwise its name has to be looked up anew."""
        return inode in self._images

    def layer(self, slot: int) -> NamedLayer | None:
        """The name of a slot."""
        return self._by_slot.get(slot)

    def get(self, image: int, digest: bytes) -> NamedLayer | None:
        """A layer that is mounted, by the inode of its image and its name."""
        return self._layers.get((self._images[image], digest.decode("utf-8", "replace")))

    async def find(self, image: int, digest: bytes) -> NamedLayer | None:
        """The layer of an image, mounted now if it is not yet.

        Args:
            image: inode of the image's directory, which is known.
            digest: name in that directory.

        Returns:
            Its name; None if there is no such layer, or it cannot be lazy.
        """
        reference = self._images[image]
        try:
            wanted = str(Digest.parse(digest.decode("ascii")))
        except (FormatError, ValueError):
            return None
        found = self._layers.get((reference, wanted))
        if found is not None:
            return found
        try:
            slot = await channel.call(
                Root(self._root).store_socket,
                "find",
                timeout=_FIND_SECONDS,
                reference=reference,
                digest=wanted,
            )
            name = await trio.to_thread.run_sync(read_name, self._root, slot)
        except LazysnapError as error:
            _log.info("not a lazy layer", reference=reference, digest=wanted, why=error)
            return None
        self._add(name)
        return name

    async def note(self, what: str, slot: int, pid: int) -> None:
        """Tell the daemon of a client's reference; a daemon that is down finds out when it starts.

        Args:
            what: `used` or `released`.
            slot: of the layer.
            pid: of the client.

        Raises:
            NotFound: the layer is gone, and its name is forgotten now.
        """
        try:
            path = Root(self._root).store_socket
            await channel.call(path, what, timeout=_NOTE_SECONDS, slot=slot, pid=pid)
        except NotFound:
            self.forget(slot)
            raise
        except LazysnapError as error:
            _log.warning("the daemon was not told", what=what, slot=slot, why=error)

    def forget(self, slot: int) -> tuple[int, bytes] | None:
        """Let go of a name; the directory that it was in and what it was called there."""
        name = self._by_slot.pop(slot, None)
        if name is None:
            return None
        self._layers.pop((name.reference, name.digest), None)
        return image_inode(name.reference), name.digest.encode()
