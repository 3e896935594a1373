# SPDX-License-Identifier: Apache-2.0
"""A layer's tree as a slot shows it: the index, and what lower layers say of left-out directories."""

from __future__ import annotations

import mmap
import os
import stat

from lazysnap.cache.stamps import touch
from lazysnap.errors import FormatError, Internal
from lazysnap.index.model import OPAQUE, Attributes
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import SlotRecord


def open_index(path: str) -> LayerIndex:
    """Map an index file into memory and check it.

    Raises:
        Internal: it cannot be read, or is not an index.
    """
    try:
        with open(path, "rb") as file:
            touch(file.fileno(), os.fstat(file.fileno()))  # so that it is not evicted
            index = LayerIndex(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    except (OSError, ValueError, FormatError) as error:
        raise Internal(f"index {path} cannot be used: {error}", reason="index-damaged") from error
    index.give_back()  # for the checksum all of it was read
    return index


class LayerView:
    """The tree of a layer as one slot shows it.

    Args:
        record: what the slot serves.
        index: of the layer; shared by all slots of the layer.
    """

    def __init__(self, record: SlotRecord, index: LayerIndex) -> None:
        self.record = record
        self.index = index
        self._inherited = {entry.node: entry for entry in record.inherited}

    def attributes(self, node: int) -> Attributes:
        """Attributes of a node, those of left-out directories as the layers below have them."""
        attributes = self.index.attributes(node)
        inherited = self._inherited.get(node)
        if inherited is not None:
            return attributes._replace(
                mode=stat.S_IFDIR | inherited.mode,
                uid=inherited.uid,
                gid=inherited.gid,
                mtime_ns=inherited.mtime_ns,
            )
        return attributes

    def xattrs(self, node: int) -> tuple[tuple[bytes, bytes], ...]:
        """Extended attributes of a node, with overlay's mark first on opaque directories."""
        inherited = self._inherited.get(node)
        found = self.index.xattrs(node) if inherited is None else tuple(inherited.xattrs)
        if self.record.opaque_xattr and self.index.attributes(node).flags & OPAQUE:
            return ((self.record.opaque_xattr, b"y"), *found)
        return found
