# SPDX-License-Identifier: Apache-2.0
"""Has the kernel read from the disk what is local of a start, before the container asks for it.

A start reads hundreds of small files, one after the other. When they are not in the page cache it waits
for the disk each time, and again for names and inodes on the way to them; asked for in advance, they come
in a fraction of that time. Advice only: nothing is checked or handed out here. Blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from lazysnap.cache import Cache
from lazysnap.fetch.fetcher import Plan
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.tree_images import tree_name
from lazysnap.prefetch.profile import Read, plan

# Bytes of one layer; what is read after so many, the kernel's own read-ahead may bring.
_MOST = 256 << 20
_TREE_MOST = 32 << 20


def prepare_start(cache: Cache, index: LayerIndex, found: Sequence[tuple[int, Read]]) -> Plan:
    """Begin to read what is local, and plan to fetch the rest.

    Args:
        cache: that may have contents of the layer.
        index: of the layer whose files a container is going to read.
        found: what a profile says of the layer, see `locate`.

    Returns:
        A plan of what is not local, and perhaps of more: it skips what it finds.
    """
    missing = []
    left = _MOST
    for node, read in found:
        file = index.file(node)
        length = min(read.length, file.size - read.offset)
        # Opened as by a reader, so that eviction knows of this use; the kernel does not tell of its own.
        fd = cache.objects.open(file.object_key, file.size) if length <= left else None
        if fd is None:
            missing.append((node, read))
            continue
        left -= length
        _advise(fd, read.offset, length)
    return plan(index, missing)


def prepare_tree(cache: Cache, record: SlotRecord) -> None:
    """Begin to read the image of a layer's tree, if there is one.

    Names and attributes are in this one file, in which the kernel would look here and there.

    Args:
        cache: that has the image.
        record: of the layer's slot.
    """
    tree = os.path.join(cache.trees, tree_name(record.index, record.inherited))
    with contextlib.suppress(OSError):  # there is none if a shard serves them
        _advise(os.open(tree, os.O_RDONLY | os.O_CLOEXEC), 0, _TREE_MOST)


def _advise(fd: int, offset: int, length: int) -> None:
    """Have the kernel read a range into the page cache; closes the file."""
    try:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass  # not every file system can
    finally:
        os.close(fd)
