# SPDX-License-Identifier: Apache-2.0
"""Makes lazy layers visible at the mount points of their snapshots.

Where the kernel can (see `kernel_trees`), a mount point shows the layer's tree from an EROFS image. What
containers get is a read-only overlay of an image's layers, `merged/<slot>` of the uppermost lazy one, in
which overlay finds the bytes of files by their digests: first among the cached objects, without asking
anybody, then in the second view of the shards. All containers of an image share it.

Otherwise the shard's own directory of a layer is bound at its mount point, which shows everything. Both
kinds can be mixed in one image, and a layer can change from one to the other at a restart. All functions
block.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Container, Sequence

import msgspec

from lazysnap import log, mounts
from lazysnap.cache import Cache
from lazysnap.errors import Internal, LazysnapError
from lazysnap.filesystem.kernel_trees import clean, merge_trees, mount_tree, why_not
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.tree_images import ensure_tree
from lazysnap.mounts import MountPoint
from lazysnap.shard.settings import serve_xattrs_everywhere
from lazysnap.snapshotter.interfaces import Attached, Lower
from lazysnap.store.records import Attachment
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)


class KernelTreeMounts:
    """The mounts of lazy layers.

    Args:
        cache: of the root.
        supervisor: of the shards.
        kernel_trees: have the kernel serve trees if it can.

    Attributes:
        knows_below: the snapshots below a layer are what will be below it in each overlay.
        may_be_late: a layer may be shown when its snapshot is in use already by name, but not by mounts.
    """

    knows_below = True
    may_be_late = True

    def __init__(self, cache: Cache, supervisor: Supervisor, *, kernel_trees: bool) -> None:
        self._cache = cache
        self._supervisor = supervisor
        with contextlib.suppress(LazysnapError, OSError):  # the next start tries again
            clean(cache.root)
        problem = why_not(cache.root) if kernel_trees else "it is switched off"
        self.serves_trees = not problem
        self._merged_root = os.path.join(supervisor.root, "merged")
        self._lock = threading.Lock()
        if self.serves_trees:
            serve_xattrs_everywhere(supervisor.root)
            cache.recover_after_boot()
        if kernel_trees and problem:
            _log.info("the kernel cannot serve trees, shards do", why=problem)

    @property
    def any_shard(self) -> bool:
        """Whether a layer with extended attributes may be on whichever shard."""
        return self.serves_trees

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        """Make a layer visible.

        Args:
            record: of its slot, which is attached.
            mountpoint: an existing directory.

        Raises:
            Internal: the kernel refused.
        """
        if self.serves_trees:
            try:
                mount_tree(self._tree(record), mountpoint)
                return
            except LazysnapError as error:
                # e.g. an xattr that EROFS cannot hold; a shard can serve everything
                _log.info("a shard serves the tree", layer=record.layer_digest, why=error)
        mounts.bind(self._supervisor.directory(record.shard, record.slot), mountpoint)

    def _tree(self, record: SlotRecord) -> str:
        return ensure_tree(self._cache, record.index, record.inherited)

    def restore(self, attached: Sequence[Attached]) -> int:
        """Show each layer that is not visible, or visible through a mount that is gone.

        Returns:
            How many cannot be shown; the log says why.
        """
        failed = 0
        points = {point.path: point for point in mounts.mount_points()}
        for each in attached:
            there = points.get(each.mountpoint)
            if there is not None and self._serves(there, each.attachment, points):
                continue
            try:
                if there is not None:
                    mounts.unmount(each.mountpoint)
                self.show(record_of(each.attachment), each.mountpoint)
            except LazysnapError as error:
                _log.error("layer not mounted", slot=each.attachment.slot, error=error)
                failed += 1
        return failed

    def _serves(
        self, there: MountPoint, attachment: Attachment, points: dict[str, MountPoint]
    ) -> bool:
        if there.fstype == "erofs":
            return self.serves_trees
        shard = points.get(self._supervisor.mountpoint(attachment.shard))
        return shard is not None and shard.device == there.device

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The directories that overlay is to have; see `Filesystem`.

        Args:
            layers: as there.
            stage: of the image's life on this node. What overlay once found on a shard it goes on
                reading from there; so in another stage another mount is used, in which it finds objects.
        """
        directories = [layer.directory for layer in layers]
        if not self.serves_trees:
            return directories
        first = next(i for i, layer in enumerate(layers) if layer.attachment is not None)
        try:
            with self._lock:
                return [*directories[:first], self._merged(layers[first:], stage)]
        except LazysnapError as error:
            _log.warning("shards serve the trees of an image", why=error)
            return [self._whole(layer) for layer in layers]

    def _merged(self, layers: Sequence[Lower], stage: str) -> str:
        """A directory that shows the uppermost layer, which is lazy, on all below it."""
        lazy = [layer.attachment for layer in layers if layer.attachment is not None]
        top = lazy[0].slot
        points = mounts.mount_points()
        devices = {point.path: point.device for point in points}
        shards = [self._supervisor.mountpoint(n) for n in dict.fromkeys(a.shard for a in lazy)]
        # A shard that was mounted anew is another file system.
        source = "+".join(["lazysnap", *(devices.get(shard, "none") for shard in shards)])
        source += f"+{stage}" * bool(stage)
        target = os.path.join(self._merged_root, str(top))
        there = mounts.mounted_at(target, points)
        if there is not None:
            if there.source == source:
                return target
            mounts.unmount(target)
        try:
            os.makedirs(target, mode=0o700, exist_ok=True)
        except OSError as error:
            raise Internal(f"cannot make {target}: {error.strerror}") from error
        merge_trees(
            [layer.directory for layer in layers],
            [self._cache.objects.root, *(f"{shard}/contents/{top}" for shard in shards)],
            source,
            target,
        )
        return target

    def _whole(self, layer: Lower) -> str:
        """Where a layer is visible with the bytes of its files, whatever the kernel can do."""
        lazy = layer.attachment
        return (
            layer.directory if lazy is None else self._supervisor.directory(lazy.shard, lazy.slot)
        )

    def hide(self, slot: int, mountpoint: str) -> None:
        """Undo `show`, and what `lower` made with this layer on top.

        Raises:
            Internal: the kernel refused.
        """
        self._discard(slot)
        mounts.unmount(mountpoint)

    def clean(self, slots: Container[int]) -> None:
        """Remove what `lower` made for slots that are no more.

        Args:
            slots: those that are.
        """
        try:
            found = [int(name) for name in os.listdir(self._merged_root) if name.isdigit()]
        except FileNotFoundError:
            return
        for slot in found:
            if slot not in slots:
                try:
                    self._discard(slot)
                except LazysnapError as error:
                    _log.warning("a mount is left", slot=slot, error=error)

    def _discard(self, slot: int) -> None:
        target = os.path.join(self._merged_root, str(slot))
        mounts.unmount(target)
        with contextlib.suppress(OSError):
            os.rmdir(target)


def record_of(attachment: Attachment) -> SlotRecord:
    """The record of an attachment's slot.

    Raises:
        Internal: it is damaged.
    """
    try:
        return msgspec.msgpack.decode(attachment.record, type=SlotRecord)
    except msgspec.MsgspecError as error:
        raise Internal(f"the record of slot {attachment.slot} is damaged: {error}") from error
