# SPDX-License-Identifier: Apache-2.0
"""The life of remote snapshots: made committed, checked before use, unmounted when they are removed.

Keeps the promises that containerd's remote snapshots rest on. A remote snapshot is in the database before
any client hears of it. No active key is ever left behind. Whatever goes wrong while a layer is mounted
leads to an ordinary snapshot, never to an error, as an error would end the whole pull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from lazysnap import log
from lazysnap.errors import LazysnapError, Unavailable
from lazysnap.labels import REMOTE
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.interfaces import Attached, Filesystem, Lower
from lazysnap.snapshotter.layer_request import NAME_TAKEN, LayerRequest, Prepared, Refused, find
from lazysnap.snapshotter.locks import DatabaseThread, KeyLocks
from lazysnap.store.records import Attachment, Lineage
from lazysnap.store.snapshots import SnapshotStore

_log = log.get(__name__)
_REMOTE_VALUE = "remote snapshot"


class RemoteSnapshots:
    """The remote snapshots of one root.

    Args:
        directories: of the root.
        store: its database.
        db_thread: runs what uses the database.
        housekeeping: collects directories that come to nothing.
        filesystem: mounts layers; None if lazy mounting is switched off.
    """

    def __init__(
        self,
        directories: Directories,
        store: SnapshotStore,
        db_thread: DatabaseThread,
        housekeeping: Housekeeping,
        filesystem: Filesystem | None,
    ) -> None:
        self._dirs = directories
        self._store = store
        self._db_thread = db_thread
        self._housekeeping = housekeeping
        self._filesystem = filesystem
        self._names = KeyLocks()

    @property
    def enabled(self) -> bool:
        """Whether layers can be mounted lazily at all."""
        return self._filesystem is not None

    async def restore(self) -> None:
        """Bring back what was mounted before a restart."""
        if self._filesystem is not None:
            attachments = await self._db_thread.run(self._store.attachments)
            await self._filesystem.restore(self._attached(attachments))

    async def prepare(self, request: LayerRequest) -> Prepared | Refused:
        """Try to answer a request with a remote snapshot.

        Args:
            request: for the snapshot of a layer.

        Returns:
            Whether the snapshot is there now, or why it is not possible.

        Raises:
            NotFound: the parent was removed meanwhile.
            Internal: the database or the disk failed.
        """
        async with self._names.hold(request.name):
            found = await find(request, self._store, self._db_thread)
            if found is None:
                return await self._make(request)
            if not request.is_met_by(found, remote=True):
                return Refused(NAME_TAKEN)
            number = found.snapshot.id
            attachment = found.attachments[number]
            if not await self.serves(attachment, request.labels):
                _log.warning("another layer has the name that is asked for", name=request.name)
                return Refused(NAME_TAKEN)
            try:
                await self._check(self._attached({number: attachment}))
            except LazysnapError as error:
                return Refused(error.reason)
            return Prepared(request.name)

    async def serves(self, attachment: Attachment, labels: Mapping[str, str]) -> bool:
        """Whether the layer of a remote snapshot is certainly the one that a request asks for.

        Args:
            attachment: of the snapshot.
            labels: of the request.
        """
        if self._filesystem is None:
            return False
        try:
            return await self._filesystem.serves(attachment, labels)
        except LazysnapError as error:
            _log.info("a layer cannot be compared", slot=attachment.slot, error=error)
        except Exception:
            _log.exception("comparing a layer failed", slot=attachment.slot)
        return False

    async def _make(self, request: LayerRequest) -> Prepared | Refused:
        assert self._filesystem is not None
        slot = await self._db_thread.run(self._store.next_slot)
        with self._housekeeping.building() as directory:

            def build() -> str:
                # "/" of a lazy layer has the owner that the layer says.
                return self._dirs.build(directory, work=False, parent_id=None)

            mountpoint = await trio.to_thread.run_sync(build)
            attachment = await self._mount(request, slot, mountpoint)
            if isinstance(attachment, Refused):
                self._housekeeping.expect_garbage()
                return attachment

            def place() -> Attached:
                labels = {**request.labels, REMOTE: _REMOTE_VALUE}
                with self._store.committing_remote(
                    request.name, request.parent, labels, attachment, parent_id=request.parent_id
                ) as number:
                    self._dirs.place(directory, number)
                return Attached(number, self._dirs.fs(number), attachment)

            try:
                self._filesystem.placed(await self._db_thread.run(place))
            except BaseException:
                await self.unmount(0, mountpoint, attachment)
                raise
        _log.info(
            "a layer is mounted lazily",
            remote_snapshot_prepared="true",
            key=request.name,
            parent=request.parent,
        )
        return Prepared(request.name)

    async def _mount(
        self, request: LayerRequest, slot: int, mountpoint: str
    ) -> Attachment | Refused:
        assert self._filesystem is not None
        attachments = {} if request.below is None else request.below.attachments
        lowers = self._layers(request.lower_ids, attachments)
        began = trio.current_time()
        try:
            attachment = await self._filesystem.mount(slot, request.labels, mountpoint, lowers)
        except LazysnapError as error:
            _log.info("a layer cannot be mounted lazily", name=request.name, error=error)
            return Refused(error.reason)
        except Exception:
            _log.exception("mounting a layer lazily failed", name=request.name)
            return Refused("internal")
        counts.observe(families.MOUNT_SECONDS, "", trio.current_time() - began)
        return attachment

    def _layers(
        self, numbers: Sequence[int], attachments: Mapping[int, Attachment]
    ) -> Sequence[Lower]:
        return [Lower(self._dirs.fs(n), attachments.get(n)) for n in numbers]

    async def check(self, lineage: Lineage) -> None:
        """Make sure that the lazy layers of a snapshot and its ancestors can serve.

        Raises:
            Unavailable: a layer cannot serve.
        """
        if lineage.attachments:
            await self._check(self._attached(lineage.attachments))

    def starting(self, lineage: Lineage) -> None:
        """A container is about to start on a snapshot whose layers were just checked."""
        if self._filesystem is not None and lineage.attachments:
            self._filesystem.starting(self._attached(lineage.attachments))

    async def lowerdirs(
        self, ancestors: Sequence[int], attachments: Mapping[int, Attachment]
    ) -> Sequence[str]:
        """The directories that overlay is to have for ancestors of a snapshot, uppermost first.

        Args:
            ancestors: their numbers, nearest first.
            attachments: of the lazy ones among them, which were checked.

        Raises:
            Internal: they cannot be made visible.
        """
        layers = self._layers(ancestors, attachments)
        if self._filesystem is None or not any(layer.attachment for layer in layers):
            return [layer.directory for layer in layers]
        return await self._filesystem.lowerdirs(layers)

    async def _check(self, chain: Sequence[Attached]) -> None:
        if self._filesystem is None:
            raise Unavailable(
                "a layer below is mounted lazily, and lazy mounting is switched off",
                hint="switch it on again, or remove the image and pull it anew",
                reason="lazy-off",
            )
        await self._filesystem.check(chain)

    async def unmount(self, number: int, mountpoint: str, attachment: Attachment) -> None:
        """Unmount and forget a layer whose snapshot is gone from the database, as far as possible.

        Args:
            number: of the snapshot.
            mountpoint: where it is visible.
            attachment: what is served.
        """
        if self._filesystem is None:
            return
        try:
            # Also if the caller was cancelled: otherwise the layer would stay mounted until the next start.
            with trio.CancelScope(shield=True):
                await self._filesystem.unmount(Attached(number, mountpoint, attachment))
        except LazysnapError as error:
            # The mount is removed with the directory, the rest at the next start.
            _log.warning("cannot unmount a lazy layer", slot=attachment.slot, error=error)

    def _attached(self, attachments: Mapping[int, Attachment]) -> Sequence[Attached]:
        return [Attached(n, self._dirs.fs(n), attachment) for n, attachment in attachments.items()]
