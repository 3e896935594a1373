# SPDX-License-Identifier: Apache-2.0
"""How attached layers become visible at the mount points of their snapshots.

A shard serves each attached layer in a directory of its own. `LayerMounts` is the contract of what makes of
that directory what overlay gets. There are three implementations: `KernelTreeMounts`, in a file of its own,
for the daemon and root; `NoMounts` for the additional layer store; `ShardDirectories` for ordinary users.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from lazysnap.errors import Internal
from lazysnap.layers.slots import SlotRecord
from lazysnap.shard.settings import serve_xattrs_everywhere
from lazysnap.snapshotter.interfaces import Attached, Lower
from lazysnap.store.records import Attachment
from lazysnap.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a way of mounting layers allows.

    Attributes:
        any_shard: a layer with extended attributes may be on any shard. Asked when a shard is chosen:
            otherwise such a layer goes to a shard that serves them, which is only known when the
            layer's index has been read.
        knows_below: the snapshots below a layer are what is below it in every overlay. Asked when a layer
            is attached: if they are, opaque directories that hide nothing need not be marked.
        may_be_late: a layer may become visible after its snapshot was made. Asked when a layer is
            mounted whose tree image is still being built: if it may not, its mount waits for the image.
        tree_images: images of layers' trees are needed. Asked when layers are opened, which builds them.
    """

    any_shard: bool
    knows_below: bool
    may_be_late: bool
    tree_images: bool


class LayerMounts(Protocol):
    """Makes attached layers visible. All methods block, and run in threads."""

    @property
    def capabilities(self) -> Capabilities:
        """What this way of mounting layers allows; does not change."""

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        """Make a layer visible.

        Args:
            record: of its slot, which is attached.
            mountpoint: an existing directory.

        Raises:
            Internal: the kernel refused.
        """

    def restore(self, attached: Sequence[Attached]) -> int:
        """Make each layer visible that is not, or whose mount is of a shard that is gone.

        Returns:
            How many cannot be made visible; the log says why.
        """

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The directories that overlay is to have for layers.

        Args:
            layers: nearest first; at least one of them is lazy.
            stage: of the image's life on this node. Overlay goes on reading a file where it found the
                file once, e.g. on a shard; in another stage it must look again.

        Returns:
            Uppermost first. One directory may show several layers.

        Raises:
            Internal: they cannot be made visible.
        """

    def hide(self, slot: int, mountpoint: str) -> None:
        """Undo `show`, and what `lowerdirs` made with this layer on top.

        Raises:
            Internal: the kernel refused.
        """

    def clean(self, slots: Container[int]) -> None:
        """Remove what `lowerdirs` made for slots that are gone.

        Args:
            slots: all that are not.
        """


class NoMounts:
    """Mounts nothing, for the additional layer store.

    Clients of the store find layers on their shard by name (see `lazysnap.shard.store_view`) and put them
    together as they like. So what is below a layer is not known here, and the image of its tree has to
    be there when the layer is.

    Args:
        root: lazysnap's root directory; all its shards serve extended attributes from now on.
        tree_images: whether clients of the store need images of layers' trees.
    """

    def __init__(self, root: str, *, tree_images: bool) -> None:
        serve_xattrs_everywhere(root)
        self._tree_images = tree_images

    @property
    def capabilities(self) -> Capabilities:
        """What this allows; see `LayerMounts`."""
        return Capabilities(
            any_shard=True, knows_below=False, may_be_late=False, tree_images=self._tree_images
        )

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        """Do nothing; see `LayerMounts`."""

    def restore(self, attached: Sequence[Attached]) -> int:
        """Nothing is mounted, so nothing can fail: 0."""
        return 0

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The snapshots' own directories, which nobody mounts."""
        return [layer.directory for layer in layers]

    def hide(self, slot: int, mountpoint: str) -> None:
        """Do nothing; see `LayerMounts`."""

    def clean(self, slots: Container[int]) -> None:
        """Do nothing; see `LayerMounts`."""


class ShardDirectories(NoMounts):
    """Gives overlay the directories of shards, for users who may mount nothing but FUSE.

    Args:
        supervisor: of the shards.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor.root, tree_images=False)
        self._supervisor = supervisor

    @property
    def capabilities(self) -> Capabilities:
        """What this allows; see `LayerMounts`."""
        return Capabilities(any_shard=True, knows_below=True, may_be_late=False, tree_images=False)

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The directories that overlay is to have; see `LayerMounts`."""
        return [
            layer.directory
            if layer.attachment is None
            else self._supervisor.directory(layer.attachment.shard, layer.attachment.slot)
            for layer in layers
        ]


def record_of(attachment: Attachment) -> SlotRecord:
    """The record of an attachment's slot.

    Raises:
        Internal: it is damaged.
    """
    try:
        return msgspec.msgpack.decode(attachment.record, type=SlotRecord)
    except msgspec.MsgspecError as error:
        raise Internal(f"the record of slot {attachment.slot} is damaged: {error}") from error
