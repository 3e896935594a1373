# SPDX-License-Identifier: Apache-2.0
"""The operations of a snapshotter: ordinary overlay snapshots, with a seam for remote ones.

The order on disk and in the database is such that a crash at any instruction leaves either the old state
or the new one, and perhaps directories that no snapshot owns. Those are collected at the next start and
by `cleanup`. Never touches the network. Knows nothing of gRPC.

Blocking work runs in threads. The database is used by one thread at a time, so its transactions are the
order of events; locks by key only spare work that would be refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from lazysnap import filters, log, mounts, overlay
from lazysnap.errors import AlreadyExists, FailedPrecondition, Internal, LazysnapError, NotFound
from lazysnap.labels import EAGER, REASON, REMOTE, SNAPSHOT_REF
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.overlay import Kind, Mount
from lazysnap.snapshotter import directory_tree
from lazysnap.snapshotter.direct_snapshots import DirectSnapshots
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.interfaces import Filesystem, Unpacker
from lazysnap.snapshotter.layer_request import LayerRequest, Prepared, Refused
from lazysnap.snapshotter.locks import DatabaseThread, KeyLocks
from lazysnap.snapshotter.remote_snapshots import RemoteSnapshots
from lazysnap.store.records import NO_LABELS, Attachment, Lineage, Snapshot, Usage
from lazysnap.store.snapshots import SnapshotStore

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration of a snapshotter.

    Args:
        sync_on_commit: wait at each commit until the file system has written everything.
        measure_seconds: how long a commit waits for its files to be counted. containerd's whole
            database is locked meanwhile; what takes longer is finished in the background.
    """

    sync_on_commit: bool = True
    measure_seconds: float = 1.0


class Snapshotter:
    """The snapshots of one root.

    Args:
        root: absolute path; made if missing.
        store: the database of this root.
        settings: what can be configured.
        filesystem: mounts layers lazily; without it every snapshot is an ordinary one.
        unpacker: unpacks layers that are not lazy; without it that is left to the client.

    Raises:
        ConfigError: the root cannot be used.
        Internal: the root cannot be made.
    """

    def __init__(
        self,
        root: str,
        store: SnapshotStore,
        *,
        settings: Settings | None = None,
        filesystem: Filesystem | None = None,
        unpacker: Unpacker | None = None,
    ) -> None:
        self._dirs = Directories(root)
        self._store = store
        self._settings = settings or Settings()
        facts = mounts.overlay_facts()
        self._options = overlay.Options(index_off=facts.index, userxattr=facts.user_namespace)
        self._db_thread = DatabaseThread()
        self._housekeeping = Housekeeping(self._dirs, store, self._db_thread)
        self._remote = RemoteSnapshots(
            self._dirs, store, self._db_thread, self._housekeeping, filesystem
        )
        self._direct = None
        if unpacker is not None:
            sync = self._settings.sync_on_commit
            self._direct = DirectSnapshots(
                self._dirs, store, self._db_thread, self._housekeeping, unpacker, sync=sync
            )
        self._keys = KeyLocks()

    # -- life -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, nursery: trio.Nursery) -> AsyncIterator[None]:
        """Start, and stop background work after the body, also if that is cancelled.

        Args:
            nursery: as for `start`.

        Raises:
            Internal: the root or the database cannot be read.
        """
        await self.start(nursery)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self.aclose()

    async def start(self, nursery: trio.Nursery) -> None:
        """Recover from however the last process ended, and begin background work.

        Args:
            nursery: where background tasks run, until `aclose`.

        Raises:
            Internal: the root or the database cannot be read.
        """
        names = self._dirs.names()
        ids = await self._db_thread.run(self._store.ids)
        for number in sorted(ids - {int(name) for name in names if name.isdecimal()}):
            _log.error("the directory of a snapshot is missing", snapshot=number)
        await self._remote.restore()
        await nursery.start(self._housekeeping.run)
        if self._direct is not None:
            self._direct.start(nursery)

    async def aclose(self) -> None:
        """Stop background work. Snapshots and their mounts stay as they are."""
        await self._housekeeping.aclose()

    # -- the operations ---------------------------------------------------------------------------

    async def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] = NO_LABELS
    ) -> tuple[Mount, ...]:
        """Make an active snapshot.

        Args:
            key: its key.
            parent: a committed snapshot, or empty.
            labels: all of its labels. With `containerd.io/snapshot.ref`, a remote snapshot is tried.

        Returns:
            How to mount it.

        Raises:
            AlreadyExists: the key is taken, or the snapshot that the labels ask for is there now.
            NotFound: there is no such parent.
            InvalidArgument: the parent is not committed.
            Unavailable: a lazy layer among the ancestors cannot serve.
        """
        async with self._keys.hold(key):
            # Labels that only lazysnap may set.
            labels = {k: v for k, v in labels.items() if k not in (REASON, REMOTE, EAGER)}
            if SNAPSHOT_REF in labels and (self._remote.enabled or self._direct is not None):
                result = await self._answer(key, parent, labels)
                if isinstance(result, Prepared):
                    raise AlreadyExists(f"snapshot {result.name!r} is ready")
                labels[REASON] = reason = result.reason
                _log.info(
                    "layer will be downloaded and unpacked",
                    remote_snapshot_prepared="false",
                    reason=reason,
                    key=key,
                    parent=parent,
                )
                counts.add(families.FALLBACKS, reason)
            return await self._create(Kind.ACTIVE, key, parent, labels)

    async def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] = NO_LABELS
    ) -> tuple[Mount, ...]:
        """Make a read-only view of a committed snapshot; arguments and errors as for `prepare`."""
        async with self._keys.hold(key):
            return await self._create(Kind.VIEW, key, parent, labels)

    async def mounts(self, key: str) -> tuple[Mount, ...]:
        """How to mount an active snapshot or a view.

        Raises:
            NotFound: there is no such key.
            FailedPrecondition: it is committed.
            Unavailable: a lazy layer among its ancestors cannot serve.
        """
        lineage = await self._db_thread.run(self._store.lineage, key)
        if lineage.snapshot.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key!r} is committed and has no mounts")
        await self._remote.check(lineage)
        found = lineage.snapshot
        lower = await self._remote.lowerdirs(lineage.ancestors, lineage.attachments)
        return self._mounts(found.kind, found.id, lower)

    async def commit(
        self, name: str, key: str, labels: Mapping[str, str] = NO_LABELS, parent: str = ""
    ) -> None:
        """Turn an active snapshot into a committed one.

        Args:
            name: its new name.
            key: the active snapshot.
            labels: its labels from now on.
            parent: for one without a parent, the one to put it on.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: there is no such key or parent.
            FailedPrecondition: the key is not active, or the parent not committed.
            InvalidArgument: the snapshot has another parent.
            Internal: its files could not be written to disk; it stays active.
        """
        async with self._keys.hold(name, key):
            active = await self._db_thread.run(self._store.check_commit, name, key, parent)
            with self._housekeeping.measuring(active.id) as measurement:
                if self._settings.sync_on_commit:
                    await trio.to_thread.run_sync(mounts.sync_filesystem, self._dirs.fs(active.id))
                usage = await measurement.take(self._settings.measure_seconds)

                def commit() -> None:
                    self._store.commit(
                        name, key, labels=labels, usage=usage, parent=parent, keep=(REASON,)
                    )

                await self._db_thread.run(commit)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its files are deleted in the background.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it has children.
        """
        async with self._keys.hold(key):
            number, attachment = await self._db_thread.run(self._store.remove, key)
            try:
                if attachment is not None:
                    await self._remote.unmount(number, self._dirs.fs(number), attachment)
            finally:
                self._housekeeping.expect_garbage()

    async def stat(self, key: str) -> Snapshot:
        """What is known of a snapshot.

        Raises:
            NotFound: there is none.
        """
        return await self._db_thread.run(self._store.stat, key)

    async def answers(self) -> None:
        """Return when the database has answered any query; for a watchdog."""
        with contextlib.suppress(NotFound):
            await self.stat("")

    async def attachment(self, key: str) -> Attachment | None:
        """What is served for a snapshot, if it is lazy.

        Raises:
            NotFound: there is none.
        """
        lineage = await self._db_thread.run(self._store.lineage, key)
        return lineage.attachments.get(lineage.snapshot.id)

    async def may_answer(self, key: str, labels: Mapping[str, str]) -> bool:
        """Whether a committed snapshot with the right chain id may answer a request for a layer.

        The files of one that was unpacked were compared with the chain id. One that is lazy has to be of
        the very layer.

        Args:
            key: the snapshot.
            labels: of the request.

        Raises:
            NotFound: there is none.
        """
        attachment = await self.attachment(key)
        return attachment is None or await self._remote.serves(attachment, labels)

    async def update(
        self, key: str, labels: Mapping[str, str], paths: Sequence[str] = ()
    ) -> Snapshot:
        """Change labels.

        Args:
            key: the snapshot.
            labels: new values; an empty one deletes.
            paths: `labels` or `labels.<key>`; none to replace all.

        Raises:
            NotFound: there is none.
            InvalidArgument: a path names something that cannot be changed.
        """
        return await self._db_thread.run(self._store.update, key, labels, paths)

    async def list(
        self, match: filters.Filter = filters.EVERYTHING, after: str | None = None
    ) -> tuple[Sequence[Snapshot], str | None]:
        """One page of the snapshots that match.

        Args:
            match: which ones.
            after: what the last call returned; None at first.

        Returns:
            Some snapshots, perhaps none, and where to go on; None at the end.
        """
        return await self._db_thread.run(self._store.page, match, after)

    async def usage(self, key: str) -> Usage:
        """What a snapshot takes by itself, without its parents.

        Raises:
            NotFound: there is none.
        """
        found = await self.stat(key)
        if found.usage is not None:
            return found.usage
        try:
            return await trio.to_thread.run_sync(
                directory_tree.measure, self._dirs.fs(found.id), trio.from_thread.check_cancelled
            )
        except Internal:
            await self.stat(key)  # It may have been removed meanwhile, which is no failure.
            raise

    async def cleanup(self) -> None:
        """Delete the directories that belong to no snapshot, and wait for it."""
        await self._housekeeping.collect()

    # -- making snapshots -------------------------------------------------------------------------

    async def _create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]
    ) -> tuple[Mount, ...]:
        below = await self._below_new(key, parent)
        lower: Sequence[str] = ()
        parent_id = None
        if below is not None:
            await self._remote.check(below)
            if kind is Kind.ACTIVE and SNAPSHOT_REF not in labels:
                self._remote.starting(below)
            parent_id = below.snapshot.id
            lower = await self._remote.lowerdirs((parent_id, *below.ancestors), below.attachments)

        with self._housekeeping.building() as directory:

            def build() -> None:
                self._dirs.build(directory, work=kind is Kind.ACTIVE, parent_id=parent_id)

            def place() -> int:
                with self._store.creating(kind, key, parent, labels, parent_id=parent_id) as number:
                    self._dirs.place(directory, number)
                return number

            await trio.to_thread.run_sync(build)
            number = await self._db_thread.run(place)
        return self._mounts(kind, number, lower)

    async def _answer(self, key: str, parent: str, labels: dict[str, str]) -> Prepared | Refused:
        """Try to answer a request for a layer without the client.

        Args:
            key: of the request.
            parent: name of the snapshot below, or empty.
            labels: of the request; gets the label that says how layers are unpacked.

        Returns:
            The snapshot, or why the layer is not lazy.
        """
        below = await self._below_new(key, parent)
        request = LayerRequest(parent, below, labels)
        if self._direct is None:
            return await self._remote.prepare(request)
        labels[EAGER] = "direct"
        with self._direct.client(labels) as pull:
            remote: Prepared | Refused = Refused("lazy-off")
            if self._remote.enabled:
                remote = await self._remote.prepare(request)
            if isinstance(remote, Prepared):
                return remote
            if below is not None:
                # The layer takes over what it leaves out from those below, which may not be visible yet.
                try:
                    await self._remote.check(below)
                except LazysnapError as error:
                    return Refused(error.reason)
            direct = await self._direct.prepare(request, remote.reason, pull)
            # Clients are told why the layer is not lazy; the log says why it was not unpacked either.
            return direct if isinstance(direct, Prepared) else remote

    async def _below_new(self, key: str, parent: str) -> Lineage | None:
        """The parent of a snapshot that will be made; raises what making it would raise."""

        def look() -> Lineage | None:
            self._store.check_new(key, parent)
            return self._store.lineage(parent) if parent else None

        return await self._db_thread.run(look)

    def _mounts(self, kind: Kind, number: int, lower: Sequence[str]) -> tuple[Mount, ...]:
        return overlay.mounts(self._dirs.snapshots, kind, number, lower, self._options)
