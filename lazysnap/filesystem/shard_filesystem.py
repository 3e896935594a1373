# SPDX-License-Identifier: Apache-2.0
"""The file system of lazy layers: mounts them on shards.

Implements `lazysnap.snapshotter.interfaces.Filesystem` with the opener and the supervisor. A crash is
harmless because of the order: an index is complete before a slot names it, a slot's record is on disk
before its directory can be looked up, and the mount comes last. `restore` removes what a crash leaves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from lazysnap import log
from lazysnap.digest import Digest
from lazysnap.errors import Internal, LazysnapError, NotLazy, Unavailable
from lazysnap.filesystem.deferred_mounts import DeferredMounts
from lazysnap.filesystem.layer_mounts import LayerMounts, record_of
from lazysnap.filesystem.open_ahead import OpenAhead
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.filesystem.profile_learner import ProfileLearner
from lazysnap.labels import RemoteRequest, parse_remote_request
from lazysnap.layers.inherited import DirectoryTree, LowerTree, ViewTree, hides_something, inherit
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.layers.slots import (
    Inherited,
    SlotRecord,
    list_slots,
    read_slot,
    remove_slot,
    write_slot,
)
from lazysnap.layers.view import LayerView, open_index
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.paths import Root
from lazysnap.reference import Reference
from lazysnap.shard.calls import Health, HealthState
from lazysnap.snapshotter.interfaces import Attached, Lower
from lazysnap.store.records import Attachment
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
_ATTACH_SECONDS = 10.0
_HEALTH_SECONDS = 4.0
_WARN_EVERY_SECONDS = 60.0


class _Merged(NamedTuple):
    """How a layer is shown on top of those below it."""

    inherited: list[Inherited]
    opaque_xattr: bytes
    xattrs: bool


class ShardFilesystem:
    """Mounts layers lazily, on the shards of a root.

    Args:
        supervisor: of the shards.
        opener: of layers.
        open_ahead: opens the other layers of an image.
        finder: of profiles in the registry.
        learner: of start-up profiles.
        layer_mounts: makes layers visible.
        opaque_xattr: how overlay on this node marks opaque directories.
        nursery: where layers are mounted later, and starts of containers are watched.
    """

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        opener: Opener,
        open_ahead: OpenAhead,
        finder: ProfileFinder,
        learner: ProfileLearner,
        layer_mounts: LayerMounts,
        opaque_xattr: bytes,
        nursery: trio.Nursery,
    ) -> None:
        self._root = supervisor.root
        self._supervisor = supervisor
        self._opener = opener
        self._nursery = nursery
        self._learner = learner
        self._finder = finder
        self._layer_mounts = layer_mounts
        self._deferred_mounts = DeferredMounts(opener, layer_mounts, nursery)
        self._open_ahead = open_ahead
        self._opaque_xattr = opaque_xattr
        self._warned: dict[int, float] = {}
        self._local: set[int] = set()  # slots of which the cache had everything when last asked

    async def mount(
        self, slot: int, labels: Mapping[str, str], mountpoint: str, lowers: Sequence[Lower]
    ) -> Attachment:
        """Attach a layer; see `Filesystem`."""
        request = parse_remote_request(labels)
        if request is None:
            raise NotLazy("the labels name no layer", reason="no-image-labels")
        source = _source(request)
        self._open_ahead.above(request, source.reference)
        opened = await self._opener.open(source)
        if source.manifest is not None:
            await self._finder.settled(source.manifest)
        record = await self._record(slot, source, opened, lowers)
        packed = msgspec.msgpack.encode(record)
        attachment = Attachment(slot, record.shard, record.layer_digest, packed)
        self._supervisor.note(record.shard, record.layer_digest)
        try:
            await trio.to_thread.run_sync(write_slot, self._root, record)
            reads = await self._learner.reads(record)
            worker = self._supervisor.worker(record.shard, timeout=_ATTACH_SECONDS)
            await worker.attach(slot, reads, reachable=opened.fetched)
            await self._deferred_mounts.show(opened, record, mountpoint)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.unmount(Attached(0, mountpoint, attachment))
            raise
        return attachment

    async def serves(self, attachment: Attachment, labels: Mapping[str, str]) -> bool:
        """Whether a layer is the one that a request asks for; see `Filesystem`."""
        request = parse_remote_request(labels)
        if request is None:
            return False
        return await self._opener.is_same(_source(request), record_of(attachment))

    async def _record(
        self, slot: int, source: LayerSource, opened: OpenedLayer, lowers: Sequence[Lower]
    ) -> SlotRecord:
        """Choose the shard of a layer, which is started if need be, and describe its slot."""
        merged = await trio.to_thread.run_sync(self._merge, opened.index, lowers)
        special = merged.xattrs and not self._layer_mounts.capabilities.any_shard
        shard = self._supervisor.choose(source.digest, xattrs=special)
        if special:
            await self._supervisor.ensure(shard)
        return SlotRecord(
            slot=slot,
            shard=shard,
            layer_digest=str(source.digest),  # msgspec encodes no subclasses of str
            index=opened.index,
            annotations=dict(opened.annotations),
            reference=source.reference.name,
            blob_size=opened.blob_size,
            manifest=str(source.manifest or ""),
            described=opened.described or msgspec.UNSET,
            opaque_xattr=merged.opaque_xattr,
            inherited=merged.inherited,
            below=[lower.attachment.slot for lower in lowers if lower.attachment is not None],
        )

    def placed(self, attached: Attached) -> None:
        """The directory of a layer has its final name; see `Filesystem`."""
        self._deferred_mounts.placed(attached)

    def _merge(self, index_name: str, lowers: Sequence[Lower]) -> _Merged:
        """How a layer is shown on top of those below it; runs in a thread."""
        index = open_index(self._index_path(index_name))
        trees = [self._tree(lower) for lower in lowers]
        try:
            inherited = inherit(index, trees)
            opaque = not self._layer_mounts.capabilities.knows_below or hides_something(
                index, trees
            )
        except OSError as error:
            raise Internal(f"a lower layer cannot be read: {error}") from error
        xattrs = opaque or index.has_xattrs or any(entry.xattrs for entry in inherited)
        return _Merged(inherited, self._opaque_xattr if opaque else b"", xattrs)

    def _tree(self, lower: Lower) -> LowerTree:
        if lower.attachment is None:
            return DirectoryTree(lower.directory)
        record = record_of(lower.attachment)
        return ViewTree(LayerView(record, open_index(self._index_path(record.index))))

    def _index_path(self, name: str) -> str:
        return Root(self._root).cache.index(name)

    async def check(self, chain: Sequence[Attached]) -> None:
        """Make sure that layers can serve reads; see `Filesystem`."""
        await self._deferred_mounts.settled(attached.attachment.slot for attached in chain)
        errors: list[LazysnapError] = []
        health: dict[int, Health] = {}

        async def check_one(shard: int) -> None:
            on_shard = [a for a in chain if a.attachment.shard == shard]
            try:
                health.update(await self._check_shard(shard, on_shard))
            except LazysnapError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for shard in {attached.attachment.shard for attached in chain}:
                nursery.start_soon(check_one, shard)
        if errors:
            raise errors[0]
        self._judge(chain, health)

    async def _check_shard(self, shard: int, chain: Sequence[Attached]) -> Mapping[int, Health]:
        slots = [attached.attachment.slot for attached in chain]
        try:
            health = await self._health(shard, slots)
        except Unavailable as error:
            _log.warning("shard does not answer, repairing it", shard=shard, error=error)
            await self._supervisor.ensure(shard)
            health = await self._health(shard, slots)
        failed = [a for a in chain if health[a.attachment.slot].state is HealthState.FAILED]
        if failed:
            # The record or the index may be gone; the database still knows what the slot serves.
            await trio.to_thread.run_sync(self._restore_records, failed)
            for attached in failed:
                await self._restore_index(attached)
            await self._supervisor.worker(shard).detach(slots, reload=True)
            health = await self._health(shard, slots)
        if await trio.to_thread.run_sync(self._layer_mounts.restore, chain):
            raise Unavailable(
                "a lazy layer cannot be mounted",
                hint="the log of the service says why",
                reason="layer-unavailable",
            )
        return health

    async def _health(self, shard: int, slots: Sequence[int]) -> Mapping[int, Health]:
        return await self._supervisor.worker(shard, timeout=_HEALTH_SECONDS).health(slots)

    def _judge(self, chain: Sequence[Attached], health: Mapping[int, Health]) -> None:
        """Refuse a chain that cannot serve, and warn of one that may not serve everything.

        A layer of which nothing is local is no reason to refuse, as long as other layers of the chain can
        serve: most starts read nothing at all from most layers.
        """
        states = {slot: found.state for slot, found in health.items()}
        self._local -= states.keys()
        self._local |= {slot for slot, state in states.items() if state is HealthState.LOCAL}
        usable = any(state.usable for state in states.values())
        now = trio.current_time()
        for attached in chain:
            slot, layer = attached.attachment.slot, attached.attachment.layer_digest
            detail = health[slot].detail
            if states[slot] is HealthState.FAILED or (
                states[slot] is HealthState.UNREACHABLE and not usable
            ):
                raise Unavailable(
                    f"layer {layer} cannot serve: {detail}",
                    hint="see `lazysnap status`; is the registry reachable from this node?",
                    reason="layer-unavailable",
                )
            last = self._warned.get(slot, float("-inf"))
            if detail and now - last >= _WARN_EVERY_SECONDS:
                self._warned[slot] = now
                _log.warning("what is not local of a layer cannot be read", layer=layer, why=detail)

    async def lowerdirs(self, layers: Sequence[Lower]) -> Sequence[str]:
        """The directories that overlay is to have; see `Filesystem`."""
        lazy = [layer.attachment for layer in layers if layer.attachment is not None]
        stage = "local" if all(attachment.slot in self._local for attachment in lazy) else ""
        if not stage:
            stage = "watched" if self._learner.watched(map(record_of, lazy)) else ""
        return await trio.to_thread.run_sync(
            partial(self._layer_mounts.lowerdirs, layers, stage=stage)
        )

    def starting(self, chain: Sequence[Attached]) -> None:
        """A container is about to start; see `Filesystem`."""
        try:
            records = [record_of(layer.attachment) for layer in chain]
        except LazysnapError as error:
            _log.warning("start not watched", error=error)
            return
        self._learner.starts_again(records)
        self._nursery.start_soon(self._learner.started, records)

    async def restore(self, attached: Sequence[Attached]) -> None:
        """Bring back what was mounted before a restart; see `Filesystem`."""
        attachments = [layer.attachment for layer in attached]
        for attachment in attachments:
            self._supervisor.note(attachment.shard, attachment.layer_digest)
        known = {attachment.slot for attachment in attachments}
        stale = [slot for slot in list_slots(self._root) if slot not in known]
        for slot in stale:
            with contextlib.suppress(LazysnapError):
                remove_slot(self._root, slot)
        await trio.to_thread.run_sync(self._layer_mounts.clean, known)
        await trio.to_thread.run_sync(self._restore_records, attached)
        shards = {attachment.shard for attachment in attachments}
        await self._supervisor.start(shards)
        failed = await trio.to_thread.run_sync(self._layer_mounts.restore, attached)
        for shard in shards:
            with contextlib.suppress(LazysnapError):
                await self._supervisor.worker(shard).detach(stale)
        counts.add(families.RESTORED, "failed", failed)
        counts.add(families.RESTORED, "ok", len(attached) - failed)
        if attached:
            _log.info(
                "lazy snapshots are restored",
                snapshots=len(attached) - failed,
                failed=failed,
                shards=len(shards),
            )

    def _restore_records(self, attached: Sequence[Attached]) -> None:
        for layer in attached:
            slot = layer.attachment.slot
            try:
                record = record_of(layer.attachment)
                try:
                    if read_slot(self._root, slot) == record:
                        continue
                except LazysnapError as error:
                    _log.debug("slot is restored", slot=slot, error=error)
                write_slot(self._root, record)
            except LazysnapError as error:
                _log.error("slot not restored", slot=slot, error=error)

    async def _restore_index(self, attached: Attached) -> None:
        """Build the index of a layer again if it is damaged or gone."""
        try:
            record = record_of(attached.attachment)
            source = LayerSource(
                Reference.parse(record.reference),
                Digest.parse(record.layer_digest),
                size=record.blob_size,
                annotations=record.annotations,
                complete=True,
            )
            await self._opener.open(source, name=record.index)
        except LazysnapError as error:
            _log.error("index not restored", slot=attached.attachment.slot, error=error)

    async def unmount(self, attached: Attached) -> None:
        """Unmount and forget a layer; see `Filesystem`."""
        slot = attached.attachment.slot
        self._warned.pop(slot, None)
        self._local.discard(slot)
        self._supervisor.note_gone(attached.attachment.shard, attached.attachment.layer_digest)
        await self._deferred_mounts.drop(slot)
        try:
            await trio.to_thread.run_sync(self._layer_mounts.hide, slot, attached.mountpoint)
        finally:
            remove_slot(self._root, slot)
            with contextlib.suppress(LazysnapError):
                await self._supervisor.worker(attached.attachment.shard).detach([slot])


def _source(request: RemoteRequest) -> LayerSource:
    return LayerSource(
        Reference.parse(request.reference),
        request.layer_digest,
        size=request.layer_size,
        media_type=request.media_type,
        annotations=request.annotations,
        manifest=request.manifest_digest,
        complete=request.media_type is not None,
    )
