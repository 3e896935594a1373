# SPDX-License-Identifier: Apache-2.0
"""The life of lazy snapshots: made committed, checked before use, released.

Keeps the promises that containerd's remote snapshots rest on: a lazy snapshot is in the database
before anyone hears of it, no active key is ever left behind, and whatever goes wrong while a layer is
mounted leads to an ordinary snapshot, never to an error, as that would end the whole pull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from lazysnap import log
from lazysnap.errors import AlreadyExists, LazysnapError, NotFound, Unavailable
from lazysnap.labels import REMOTE, SNAPSHOT_REF
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.overlay import Kind
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.interfaces import Attached, Filesystem, Lower
from lazysnap.snapshotter.locks import DatabaseThread, KeyLocks
from lazysnap.store.records import Attachment, Lineage
from lazysnap.store.snapshots import SnapshotStore

_log = log.get(__name__)
_REMOTE_VALUE = "remote snapshot"


class RemoteSnapshots:
    """The lazy snapshots of one root.

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

    async def prepare(self, parent: str, below: Lineage | None, labels: Mapping[str, str]) -> str:
        """Try to make a committed lazy snapshot.

        Args:
            parent: name of the snapshot below, or empty.
            below: the same, as it is in the database.
            labels: of the request.

        Returns:
            Why it is not possible, as a reason code.

        Raises:
            AlreadyExists: it is there now.
            NotFound: the parent was removed meanwhile.
            Internal: the database or the disk failed.
        """
        ref = labels[SNAPSHOT_REF]
        parent_id = None if below is None else below.snapshot.id
        # One chain id can be put on different parents: the lower layers of two namespaces may be
        # ordinary snapshots with names of their own.
        name = f"{ref}@{parent_id or 0}"
        async with self._names.hold(name):
            try:
                found = await self._db_thread.run(self._store.lineage, name)
            except NotFound:
                return await self._make(name, (parent, parent_id), labels, self._lowers(below))
            snapshot = found.snapshot
            attachment = found.attachments.get(snapshot.id)
            if (
                attachment is None
                or snapshot.kind is not Kind.COMMITTED
                or snapshot.parent != parent
                or snapshot.labels.get(SNAPSHOT_REF) != ref
            ):
                # containerd would look for it by parent and label, in vain
                return "name-taken"
            try:
                await self._check(self._attached({snapshot.id: attachment}))
            except LazysnapError as error:
                return error.reason
            raise AlreadyExists(f"lazy snapshot {name!r} exists")

    def _lowers(self, below: Lineage | None) -> Sequence[Lower]:
        if below is None:
            return ()
        return self._layers((below.snapshot.id, *below.ancestors), below.attachments)

    def _layers(
        self, numbers: Sequence[int], attachments: Mapping[int, Attachment]
    ) -> Sequence[Lower]:
        return [Lower(self._dirs.fs(n), attachments.get(n)) for n in numbers]

    async def _make(
        self,
        name: str,
        parent: tuple[str, int | None],
        labels: Mapping[str, str],
        lowers: Sequence[Lower],
    ) -> str:
        assert self._filesystem is not None
        slot = await self._db_thread.run(self._store.next_slot)
        with self._housekeeping.building() as directory:

            def build() -> str:
                # "/" of a lazy layer has the owner that the layer says
                return self._dirs.build(directory, work=False, parent_id=None)

            mountpoint = await trio.to_thread.run_sync(build)
            try:
                began = trio.current_time()
                attachment = await self._filesystem.mount(slot, labels, mountpoint, lowers)
                counts.observe(families.MOUNT_SECONDS, "", trio.current_time() - began)
            except LazysnapError as error:
                self._housekeeping.expect_garbage()
                _log.info("a layer cannot be mounted lazily", name=name, error=error)
                return error.reason
            except Exception:
                self._housekeeping.expect_garbage()
                _log.exception("mounting a layer lazily failed", name=name)
                return "internal"

            def place() -> Attached:
                stored = {**labels, REMOTE: _REMOTE_VALUE}
                with self._store.committing_remote(
                    name, parent[0], stored, attachment, parent_id=parent[1]
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
            key=name,
            parent=parent[0],
        )
        raise AlreadyExists(f"lazy snapshot {name!r} is ready")

    async def check(self, lineage: Lineage) -> None:
        """See that the lazy layers of a snapshot and its ancestors can serve.

        Raises:
            Unavailable: one cannot.
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
            # also when the caller was cancelled: nobody would come back to it before the next start
            with trio.CancelScope(shield=True):
                await self._filesystem.unmount(Attached(number, mountpoint, attachment))
        except LazysnapError as error:
            # the mount goes when the directory is deleted, the rest at the next start
            _log.warning("cannot release a lazy layer", slot=attachment.slot, error=error)

    def _attached(self, attachments: Mapping[int, Attachment]) -> Sequence[Attached]:
        return [Attached(n, self._dirs.fs(n), each) for n, each in attachments.items()]
