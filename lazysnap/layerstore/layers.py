# SPDX-License-Identifier: Apache-2.0
"""The layers of the store: made when a client asks, removed when none uses them any more.

Invariant: a name is on disk only while its slot serves, and a layer without a name is garbage. So the
name is written last and removed first; `start` removes what a crash left in between.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter

import msgspec
import trio

from lazysnap import labels as label_names
from lazysnap import log
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, LazysnapError, NotFound, NotLazy
from lazysnap.layers.store_names import NamedLayer, list_names, read_name, remove_name, write_name
from lazysnap.layerstore.images import Images
from lazysnap.layerstore.information import information
from lazysnap.layerstore.kernel_trees import KernelTrees
from lazysnap.layerstore.references import References, is_stored
from lazysnap.layerstore.storages import Using
from lazysnap.overlay import Kind
from lazysnap.reference import Reference
from lazysnap.registry.image import Image
from lazysnap.snapshotter.layer_request import remote_name
from lazysnap.snapshotter.locks import KeyLocks
from lazysnap.snapshotter.snapshotter import Snapshotter

_log = log.get(__name__)
# A client asks for a layer before it says that it uses it.
_UNUSED_SECONDS = 120.0


class LayerStore:
    """See the module.

    Args:
        root: lazysnap's root directory.
        snapshotter: started.
        images: that clients ask for.
        references: of clients.
        trees: of layers, where the kernel can serve them.
    """

    def __init__(
        self,
        root: str,
        snapshotter: Snapshotter,
        images: Images,
        references: References,
        trees: KernelTrees,
    ) -> None:
        self._root = root
        self._snapshotter = snapshotter
        self._images = images
        self._references = references
        self._trees = trees
        self._names: dict[int, NamedLayer] = {}
        self._locks = KeyLocks()
        self._showing = trio.Lock()
        # until when a layer stays that nobody has used yet
        self._awaited: dict[int, float] = {}
        self._uses: Counter[int] = Counter()

    async def start(self) -> None:
        """Take up what an earlier daemon left.

        Raises:
            LazysnapError: the database or the disk fails.
        """
        served = await self._served()
        for slot in list_names(self._root):
            try:
                name = read_name(self._root, slot)
                if slot in served:
                    self._names[slot] = name
                    self._expect(slot)
                    continue
            except LazysnapError as error:
                _log.warning("a layer is forgotten", slot=slot, error=error)
            remove_name(self._root, slot)
        for slot, key in served.items():
            if slot not in self._names:
                await self._snapshotter.remove(key)

    async def _served(self) -> dict[int, str]:
        """The key of the snapshot of each slot; snapshots that have none are removed."""
        found = {}
        after: str | None = None
        while True:
            page, after = await self._snapshotter.list(after=after)
            for snapshot in page:
                attachment = await self._snapshotter.attachment(snapshot.name)
                if snapshot.kind is Kind.COMMITTED and attachment is not None:
                    found[attachment.slot] = snapshot.name
                else:
                    await self._snapshotter.remove(snapshot.name)
            if after is None:
                return found

    async def find(self, reference: str, digest: str) -> int:
        """The slot of a layer, which is made if it is not there.

        Args:
            reference: of the image, as the client writes it.
            digest: of the layer's blob or of its table of contents.

        Raises:
            NotFound: the image has no such layer.
            NotLazy: it cannot be lazy; `reason` says why.
            LazysnapError: it cannot be had.
        """
        key = _key(reference, digest)
        async with self._locks.hold(key):
            for name in self._names.values():
                if (name.reference, name.digest) == (reference, digest):
                    self._expect(name.slot)
                    return name.slot
            image, number = await self._images.find(Reference.parse(reference), digest)
            slot = await self._make(image, number, key)
            layer = (image.manifest.layers or ())[number]
            name = NamedLayer(
                slot=slot,
                reference=reference,
                digest=digest,
                info=information(layer, image.config.diff_ids[number], digest),
            )
            self._expect(slot)
            await trio.to_thread.run_sync(write_name, self._root, name)
            self._names[slot] = name
            return slot

    async def _make(self, image: Image, number: int, key: str) -> int:
        """Have a lazy snapshot of a layer; its slot."""
        layers = image.manifest.layers or ()
        wanted = image.layer_labels(number, key)
        temporary = f"layer {secrets.token_hex(8)}"
        try:
            await self._snapshotter.prepare(temporary, "", wanted)
        except AlreadyExists:
            attachment = await self._snapshotter.attachment(remote_name(key, None))
            if attachment is None:
                raise NotLazy(f"layer {layers[number].digest} is not served") from None
            return attachment.slot
        reason = (await self._snapshotter.stat(temporary)).labels.get(label_names.REASON, "")
        await self._snapshotter.remove(temporary)
        raise NotLazy(f"layer {layers[number].digest} cannot be lazy: {reason}", reason=reason)

    def _expect(self, slot: int) -> None:
        self._awaited[slot] = trio.current_time() + _UNUSED_SECONDS

    async def used(self, slot: int, pid: int) -> None:
        """A client uses a layer.

        Args:
            slot: of the layer.
            pid: of the client; 0 if that cannot be told.

        Raises:
            NotFound: the layer is gone.
        """
        if slot not in self._names:
            raise NotFound(f"nothing is attached to slot {slot}")
        self._uses[slot] += 1
        using = await self._references.used(slot, pid)
        _log.debug("a layer is used", slot=slot, pid=pid, how=using.value)
        if using is Using.UNSEEN:
            await self._count(slot, 1)
        self._awaited.pop(slot, None)

    async def released(self, slot: int, pid: int) -> None:
        """A client does not use a layer any more; arguments and errors as for `used`."""
        if slot not in self._names:
            raise NotFound(f"nothing is attached to slot {slot}")
        _log.debug("a layer is released", slot=slot, pid=pid)
        self._awaited.pop(slot, None)
        if not self._references.released(slot, pid) and self._names[slot].unseen:
            await self._count(slot, -1)

    async def show_trees(self) -> None:
        """Have the kernel serve the trees of all layers, as far as that is possible.

        Takes no lock of a layer, as looking up the path of a layer can lead back to `find`.
        """
        async with self._showing:
            wanted = list(self._names.values())
            for name in await trio.to_thread.run_sync(self._trees.missing, wanted):
                if name.slot in self._names:
                    await trio.to_thread.run_sync(self._trees.show, name)

    async def _count(self, slot: int, change: int) -> None:
        name = self._names[slot]
        name = msgspec.structs.replace(name, unseen=max(0, name.unseen + change))
        self._names[slot] = name
        await trio.to_thread.run_sync(write_name, self._root, name)

    async def collect(self) -> int:
        """Remove the layers that nobody uses; how many there were."""
        # Whoever begins to use one while the storages are looked at may be done before the end of it.
        unused = {slot: self._uses[slot] for slot in self._names if not self._looked_at(slot)}
        stored = await self._references.stored() if unused else None
        if stored is None:
            return 0
        removed = 0
        for slot, uses in unused.items():
            name = self._names.get(slot)
            if name is None or is_stored(name, stored):
                continue
            # In this order, see `show_trees`; its look at the path would have the layer made anew.
            async with self._showing, self._locks.hold(_key(name.reference, name.digest)):
                if slot in self._names and self._uses[slot] == uses and not self._looked_at(slot):
                    await self._remove(name)
                    removed += 1
        return removed

    def _looked_at(self, slot: int) -> bool:
        awaited = self._awaited.get(slot, 0.0) > trio.current_time()
        return awaited or self._references.looked_at(slot)

    async def _remove(self, name: NamedLayer) -> None:
        await trio.to_thread.run_sync(self._trees.hide, name)
        await trio.to_thread.run_sync(remove_name, self._root, name.slot)
        del self._names[name.slot]
        self._awaited.pop(name.slot, None)
        self._uses.pop(name.slot, None)
        try:
            await self._snapshotter.remove(remote_name(_key(name.reference, name.digest), None))
        except NotFound:
            return
        _log.info("a layer is removed", reference=name.reference, digest=name.digest)


def _key(reference: str, digest: str) -> str:
    """What stands for a chain id: one for each name of a layer."""
    return Digest.from_hash(hashlib.sha256(f"{reference} {digest}".encode()))
