# SPDX-License-Identifier: Apache-2.0
"""The content view of a shard: files by what they contain, `contents/<slot>/<aa>/<name>`.

For images whose trees the kernel serves itself (see `lazysnap.erofs`), overlay looks here for the bytes
of a file that `cache/objects` does not have. `<slot>` is the uppermost layer of the image; its
directory shows the contents of that layer and of all below it, as far as they are on this shard. A file
is the same inode as in the directory of its own layer. Knows nothing of FUSE but its inode numbers.
"""

from __future__ import annotations

import re

from lazysnap.erofs.xattrs import PARTIAL_PREFIX
from lazysnap.errors import NotFound
from lazysnap.layers.slots import SlotRecord, read_slot
from lazysnap.shard.mounted_layers import MountedLayer, MountedLayers

NAME = b"contents"
_VIEW = 1 << 62
_TOP = 1
_FIRST_DIGITS = 2
_OTHER = re.compile(rb"[^0-9a-f]")
_SLOT_MASK = (1 << 30) - 1
_NUMBER_MASK = (1 << 32) - 1
ROOT = _VIEW | _TOP
"""Inode of the directory with a directory for each slot."""


def is_directory(inode: int) -> bool:
    """Whether an inode is a directory of this view."""
    return bool(inode & _VIEW)


class ContentView:
    """Finds files by what they contain.

    Args:
        layers: of the shard.
    """

    def __init__(self, layers: MountedLayers) -> None:
        self._layers = layers
        self._chains: dict[int, tuple[int, ...]] = {}

    async def lookup(self, parent: int, name: bytes) -> int | tuple[MountedLayer, int] | None:
        """What is called `name` in a directory of this view.

        Returns:
            The inode of a directory, or a layer and its node; None if there is no such thing.

        Raises:
            Internal: a layer that might have it cannot be used.
        """
        slot, number = parent >> 32 & _SLOT_MASK, parent & _NUMBER_MASK
        if slot == 0:
            return await self._top(name)
        if number == _TOP:
            first = _raw(name, 1)
            return None if first is None else _VIEW | slot << 32 | _FIRST_DIGITS + first[0]
        digits = name.removeprefix(PARTIAL_PREFIX)
        key = _raw(digits, 32)
        if key is None or key[0] != number - _FIRST_DIGITS:
            return None
        for each in await self._chain(slot):
            layer = await self._layers.load(each)
            node = layer.index.find(key)
            if node >= 0 and layer.index.file(node).has_object_key == (digits == name):
                return layer, node
        return None

    async def _top(self, name: bytes) -> int | None:
        if not name.isdigit() or name.startswith(b"0") or int(name) > _SLOT_MASK:
            return None
        try:
            await self._chain(int(name))
        except NotFound:
            return None
        return _VIEW | int(name) << 32 | _TOP

    async def _chain(self, slot: int) -> tuple[int, ...]:
        """The slots of this shard among a slot and those below it, nearest first."""
        found = self._chains.get(slot)
        if found is None:
            root = self._layers.root
            top = read_slot(root, slot)
            records: list[SlotRecord] = [top, *(read_slot(root, below) for below in top.below)]
            found = tuple(each.slot for each in records if each.shard == self._layers.shard)
            self._chains[slot] = found
        return found


def _raw(digits: bytes, length: int) -> bytes | None:
    """The bytes that lower-case hexadecimal digits stand for; None if they are not so many."""
    if len(digits) != 2 * length or _OTHER.search(digits):
        return None
    return bytes.fromhex(digits.decode("ascii"))
