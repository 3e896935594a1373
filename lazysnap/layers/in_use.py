# SPDX-License-Identifier: Apache-2.0
"""Tells which indexes and images of trees the slots of a root need, for those who remove the others.

An index is made before the record of the slot that needs it is written: whoever removes what is named
nowhere has to spare what was opened lately.
"""

from __future__ import annotations

from lazysnap import log
from lazysnap.errors import Internal, NotFound
from lazysnap.layers.slots import list_slots, read_slot
from lazysnap.layers.tree_images import tree_name

_log = log.get(__name__)


def names_in_use(root: str) -> set[str] | None:
    """The names of the files in `cache/index` and `cache/trees` that slots need.

    Args:
        root: lazysnap's root directory.

    Returns:
        None if a slot cannot be read, as it may need any.
    """
    used: set[str] = set()
    for slot in list_slots(root):
        try:
            record = read_slot(root, slot)
        except NotFound:
            continue  # removed just now
        except Internal as error:
            _log.warning("no index is removed, as a slot cannot be read", slot=slot, error=error)
            return None
        used.add(record.index)
        used.add(tree_name(record.index))
        used.add(tree_name(record.index, nested=True))
        if record.inherited:
            used.add(tree_name(record.index, record.inherited))
    return used
