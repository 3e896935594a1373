# SPDX-License-Identifier: Apache-2.0
"""Makes lazy layers visible at the mount points of their snapshots.

Where the kernel can (see `composing`), a mount point shows the layer's tree from an EROFS image, and
overlay finds the bytes of its files by their digests: first among the cached objects, without asking
anybody, then in the second view of the layer's shard. Otherwise the shard's own directory of the layer
is bound there, which shows everything. Both kinds can be mixed in one image, and a layer can change from
one to the other at a restart. All functions block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from lazysnap import log, mounts
from lazysnap.cache import Cache
from lazysnap.errors import Internal, LazysnapError
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.trees import ensure_tree
from lazysnap.mounts import MountPoint
from lazysnap.overlay import Composition
from lazysnap.snapshotter.composing import mount_tree, why_not
from lazysnap.snapshotter.remote import Attached
from lazysnap.store.records import Attachment
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)


class Showing:
    """The mounts of lazy layers.

    Args:
        cache: of the root.
        supervisor: of the shards.
        kernel_trees: have the kernel serve trees if it can.
    """

    def __init__(self, cache: Cache, supervisor: Supervisor, *, kernel_trees: bool) -> None:
        self._cache = cache
        self._supervisor = supervisor
        problem = why_not(cache.root) if kernel_trees else "it is switched off"
        self.composing = not problem
        self._metacopy = mounts.overlay_facts().metacopy
        if kernel_trees and problem:
            _log.info("the kernel cannot serve trees, shards do", why=problem)

    def show(self, record: SlotRecord, mountpoint: str) -> None:
        """Make a layer visible.

        Args:
            record: of its slot, which is attached.
            mountpoint: an existing directory.

        Raises:
            Internal: the kernel refused.
        """
        if self.composing:
            try:
                mount_tree(self._tree(record), mountpoint)
                return
            except LazysnapError as error:
                # e.g. an xattr that EROFS cannot hold; a shard can serve everything
                _log.info("a shard serves the tree", layer=record.layer_digest, why=error)
        mounts.bind(self._supervisor.directory(record.shard, record.slot), mountpoint)

    def _tree(self, record: SlotRecord) -> str:
        return ensure_tree(self._cache, record.index, record.inherited)

    def restore(self, attached: Sequence[Attached]) -> None:
        """Show each layer that is not visible, or visible through a mount that is gone."""
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

    def _serves(
        self, there: MountPoint, attachment: Attachment, points: dict[str, MountPoint]
    ) -> bool:
        if there.fstype == "erofs":
            return self.composing
        shard = points.get(self._supervisor.mountpoint(attachment.shard))
        return shard is not None and shard.device == there.device

    def composition(self, chain: Sequence[Attached]) -> Composition | None:
        """How overlay finds the bytes; see `RemoteLayers`."""
        if not chain:
            return None
        if not self.composing:
            return Composition((), {}, self._metacopy)
        top = chain[0].attachment.slot
        shards = dict.fromkeys(each.attachment.shard for each in chain)
        views = [os.path.join(self._supervisor.mountpoint(n), "contents", str(top)) for n in shards]
        whole = {
            each.snapshot_id: self._supervisor.directory(
                each.attachment.shard, each.attachment.slot
            )
            for each in chain
        }
        return Composition((self._cache.objects.root, *views), whole, self._metacopy)


def record_of(attachment: Attachment) -> SlotRecord:
    """The record of an attachment's slot.

    Raises:
        Internal: it is damaged.
    """
    try:
        return msgspec.msgpack.decode(attachment.record, type=SlotRecord)
    except msgspec.MsgspecError as error:
        raise Internal(f"the record of slot {attachment.slot} is damaged: {error}") from error
