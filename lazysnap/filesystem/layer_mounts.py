# SPDX-License-Identifier: Apache-2.0
"""In place of `KernelTreeMounts`, for layers that are not mounted one by one."""

from __future__ import annotations

from collections.abc import Container, Sequence

from lazysnap.layers.slots import SlotRecord
from lazysnap.shard.settings import serve_xattrs_everywhere
from lazysnap.snapshotter.interfaces import Attached, Lower
from lazysnap.supervisor import Supervisor


class NoMounts:
    """Mounts nothing.

    Whoever uses layers finds them on their shard by name (see `lazysnap.shard.store_view`) and puts them
    together as it likes: nobody here knows what will be below a layer.

    Args:
        root: lazysnap's root directory; all its shards serve extended attributes from now on.

    Attributes:
        any_shard: as in `KernelTreeMounts`.
        knows_below: as in `KernelTreeMounts`.
        may_be_late: as in `KernelTreeMounts`; others use the images of trees as soon as a layer is there.
    """

    any_shard = True
    knows_below = False
    may_be_late = False

    def __init__(self, root: str) -> None:
        serve_xattrs_everywhere(root)

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        """Nothing."""

    def restore(self, attached: Sequence[Attached]) -> int:
        """Nothing, of which none fails."""
        return 0

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The directories as they are, which is for nobody to see."""
        return [layer.directory for layer in layers]

    def hide(self, slot: int, mountpoint: str) -> None:
        """Nothing."""

    def clean(self, slots: Container[int]) -> None:
        """Nothing."""


class ShardDirectories(NoMounts):
    """For who may mount nothing but FUSE: overlay gets the directories of shards.

    Args:
        supervisor: of the shards.
    """

    knows_below = True

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor.root)
        self._supervisor = supervisor

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The directories that overlay is to have; see `Filesystem`."""
        return [
            layer.directory
            if layer.attachment is None
            else self._supervisor.directory(layer.attachment.shard, layer.attachment.slot)
            for layer in layers
        ]
