# SPDX-License-Identifier: Apache-2.0
"""Mounts lazy layers: their trees from EROFS images that the kernel serves, or the directories of shards.

Where the kernel can (see `kernel_trees`), a mount point shows the layer's tree from an EROFS image.
Containers get a read-only overlay of an image's layers, `merged/<slot>` of the uppermost lazy one. In it
overlay finds the bytes of files by their digests: first among the cached objects, without asking any
process, then in the content view of the shards. All containers of an image share this overlay.

Otherwise the shard's directory of a layer is bound at its mount point, which shows everything. Both kinds
can be mixed in one image, and a layer can change from one to the other at a restart. All functions block.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Container, Sequence

from lazysnap import log, mounts
from lazysnap.cache import Cache
from lazysnap.errors import Internal, LazysnapError
from lazysnap.filesystem.kernel_trees import clean, merge_trees, mount_tree, why_not
from lazysnap.filesystem.layer_mounts import Capabilities, record_of
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.tree_images import ensure_tree
from lazysnap.mounts import MountPoint
from lazysnap.paths import Root
from lazysnap.shard.settings import serve_xattrs_everywhere
from lazysnap.snapshotter.interfaces import Attached, Lower
from lazysnap.store.records import Attachment
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)


class KernelTreeMounts:
    """The mounts of lazy layers; see `LayerMounts`.

    Args:
        cache: of the root.
        supervisor: of the shards.
        kernel_trees: have the kernel serve trees if it can.
    """

    def __init__(self, cache: Cache, supervisor: Supervisor, *, kernel_trees: bool) -> None:
        self._cache = cache
        self._supervisor = supervisor
        with contextlib.suppress(LazysnapError, OSError):  # the next start tries again
            clean(cache.root)
        problem = why_not(cache.root) if kernel_trees else "it is switched off"
        self._serves_trees = not problem
        self._root = Root(supervisor.root)
        self._lock = threading.Lock()
        if self._serves_trees:
            serve_xattrs_everywhere(supervisor.root)
            cache.recover_after_boot()
        if kernel_trees and problem:
            _log.info("the kernel cannot serve trees, shards do", why=problem)

    @property
    def capabilities(self) -> Capabilities:
        """What this allows; see `LayerMounts`."""
        return Capabilities(
            any_shard=self._serves_trees,
            knows_below=True,
            may_be_late=True,
            tree_images=self._serves_trees,
        )

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        """Make a layer visible; see `LayerMounts`."""
        if self._serves_trees:
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
        """Make each layer visible that is not; see `LayerMounts`."""
        failed = 0
        points = {point.path: point for point in mounts.mount_points()}
        for layer in attached:
            point = points.get(layer.mountpoint)
            if point is not None and self._serves(point, layer.attachment, points):
                continue
            try:
                if point is not None:
                    mounts.unmount(layer.mountpoint)
                self.show(record_of(layer.attachment), layer.mountpoint)
            except LazysnapError as error:
                _log.error("layer not mounted", slot=layer.attachment.slot, error=error)
                failed += 1
        return failed

    def _serves(
        self, point: MountPoint, attachment: Attachment, points: dict[str, MountPoint]
    ) -> bool:
        if point.fstype == "erofs":
            return self._serves_trees
        shard = points.get(self._supervisor.mountpoint(attachment.shard))
        return shard is not None and shard.device == point.device

    def lowerdirs(self, layers: Sequence[Lower], *, stage: str = "") -> Sequence[str]:
        """The directories that overlay is to have; see `LayerMounts`.

        Another stage makes another mount, in which overlay finds objects that it read from shards before.
        """
        directories = [layer.directory for layer in layers]
        if not self._serves_trees:
            return directories
        first = next(i for i, layer in enumerate(layers) if layer.attachment is not None)
        try:
            with self._lock:
                return [*directories[:first], self._merged(layers[first:], stage)]
        except LazysnapError as error:
            _log.warning("shards serve the trees of an image", why=error)
            return [self._whole(layer) for layer in layers]

    def _merged(self, layers: Sequence[Lower], stage: str) -> str:
        """A directory that shows the uppermost layer, which is lazy, on top of all below it."""
        lazy = [layer.attachment for layer in layers if layer.attachment is not None]
        top = lazy[0].slot
        points = mounts.mount_points()
        devices = {point.path: point.device for point in points}
        shards = list(dict.fromkeys(a.shard for a in lazy))
        # A shard that was mounted anew is another file system.
        source = "+".join(["lazysnap", *(devices.get(self._root.shard(n), "none") for n in shards)])
        source += f"+{stage}" * bool(stage)
        target = self._root.merged_slot(top)
        present = mounts.mounted_at(target, points)
        if present is not None:
            if present.source == source:
                return target
            mounts.unmount(target)
        try:
            os.makedirs(target, mode=0o700, exist_ok=True)
        except OSError as error:
            raise Internal(f"cannot make {target}: {error.strerror}") from error
        merge_trees(
            [layer.directory for layer in layers],
            [self._cache.objects.root, *(self._root.shard_contents(n, top) for n in shards)],
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
        """Undo `show` and `lowerdirs`; see `LayerMounts`."""
        self._discard(slot)
        mounts.unmount(mountpoint)

    def clean(self, slots: Container[int]) -> None:
        """Remove what `lowerdirs` made for slots that are gone; see `LayerMounts`."""
        try:
            found = [int(name) for name in os.listdir(self._root.merged) if name.isdigit()]
        except FileNotFoundError:
            return
        for slot in found:
            if slot not in slots:
                try:
                    self._discard(slot)
                except LazysnapError as error:
                    _log.warning("a mount is left", slot=slot, error=error)

    def _discard(self, slot: int) -> None:
        target = self._root.merged_slot(slot)
        mounts.unmount(target)
        with contextlib.suppress(OSError):
            os.rmdir(target)
