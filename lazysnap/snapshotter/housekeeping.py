# SPDX-License-Identifier: Apache-2.0
"""Work that nobody waits for, or not for long: deleting garbage and counting what files take.

What is left undone when the process ends is found again at the next start: garbage is every
directory that the database does not know, and a snapshot that was not counted has no usage there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from lazysnap import log
from lazysnap.errors import LazysnapError
from lazysnap.snapshotter import directory_tree
from lazysnap.snapshotter.directories import Directories, garbage
from lazysnap.snapshotter.locks import DatabaseThread
from lazysnap.store.records import Usage
from lazysnap.store.snapshots import SnapshotStore

_log = log.get(__name__)


class Measurement:
    """The usage of one snapshot, being counted while it is committed."""

    def __init__(self) -> None:
        self._counted = trio.Event()
        self._usage: Usage | None = None
        self._taken = False
        self._committed = trio.Event()
        self._scope = trio.CancelScope()

    async def take(self, limit: float) -> Usage | None:
        """The result, to be stored by the caller.

        Args:
            limit: how long to wait, in seconds.

        Returns:
            None if it takes longer or fails. Then it is stored later, if at all.
        """
        with trio.move_on_after(limit):
            await self._counted.wait()
        self._taken = self._usage is not None
        return self._usage

    async def run(self, housekeeping: Housekeeping, snapshot_id: int) -> None:
        """Count, and store what was not taken."""
        with self._scope:
            self._usage = await housekeeping.count(snapshot_id)
            self._counted.set()
            await self._committed.wait()
            if not self._taken:
                await housekeeping.store_usage(snapshot_id, self._usage)

    def end(self, *, committed: bool) -> None:
        """Say whether the snapshot is in the database now."""
        if committed:
            self._committed.set()
        else:
            self._scope.cancel()


class Housekeeping:
    """Background work for one root.

    Args:
        directories: of the root.
        store: its database.
        db_thread: runs what uses the database.
    """

    def __init__(
        self, directories: Directories, store: SnapshotStore, db_thread: DatabaseThread
    ) -> None:
        self._dirs = directories
        self._store = store
        self._db_thread = db_thread
        # directories that are being built and have no number yet
        self._building: set[str] = set()
        self._garbage_expected = trio.Event()
        self._collecting = trio.Lock()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until `aclose`."""
        unmeasured = await self._db_thread.run(self._store.unmeasured)
        self.expect_garbage()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._collect_when_expected)
                    nursery.start_soon(self._count_all, unmeasured)
                    task_status.started()
        finally:
            self._stopped.set()

    async def aclose(self) -> None:
        """Stop, within the time that one directory takes."""
        self._scope.cancel()
        if self._nursery is not None:
            await self._stopped.wait()

    # -- garbage ----------------------------------------------------------------------------------

    @contextmanager
    def building(self) -> Iterator[str]:
        """A name for a directory that is to be built in the body.

        It is garbage afterwards, unless it has been given a number.
        """
        name = self._dirs.new_name()
        self._building.add(name)
        try:
            yield name
        except BaseException:
            self.expect_garbage()
            raise
        finally:
            self._building.discard(name)

    def expect_garbage(self) -> None:
        """Have garbage collected soon."""
        self._garbage_expected.set()

    async def collect(self) -> None:
        """Delete all directories that belong to no snapshot, as far as possible."""
        async with self._collecting:
            for name in await self._db_thread.run(self._find_garbage):
                if name in self._building:
                    continue
                try:
                    await trio.to_thread.run_sync(
                        self._dirs.dispose, name, trio.from_thread.check_cancelled
                    )
                except LazysnapError as error:
                    _log.warning("cannot delete a directory, will try again later", error=error)

    def _find_garbage(self) -> list[str]:
        # In one turn, so that no directory can get its number between the steps. A number can come
        # again after a transaction that failed, so nothing is deleted while it bears one.
        return [
            self._dirs.discard(name) if name.isdecimal() else name
            for name in garbage(self._dirs.names(), self._store.ids())
        ]

    async def _collect_when_expected(self) -> None:
        while True:
            await self._garbage_expected.wait()
            # Here alone: were it made anew by a client's Cleanup, this would wait for the old one.
            self._garbage_expected = trio.Event()
            try:
                await self.collect()
            except LazysnapError as error:
                _log.warning("cannot look for left-over directories", error=error)

    # -- usage ------------------------------------------------------------------------------------

    @contextmanager
    def measuring(self, snapshot_id: int) -> Iterator[Measurement]:
        """Count what a snapshot takes while the body commits it."""
        assert self._nursery is not None, "not running"
        measurement = Measurement()
        self._nursery.start_soon(measurement.run, self, snapshot_id)
        try:
            yield measurement
        except BaseException:
            measurement.end(committed=False)
            raise
        measurement.end(committed=True)

    async def count(self, snapshot_id: int) -> Usage | None:
        """What a snapshot takes, or None if it cannot be counted."""
        try:
            return await trio.to_thread.run_sync(
                directory_tree.measure, self._dirs.fs(snapshot_id), trio.from_thread.check_cancelled
            )
        except LazysnapError as error:
            _log.warning("cannot count what a snapshot takes", snapshot=snapshot_id, error=error)
            return None

    async def store_usage(self, snapshot_id: int, usage: Usage | None) -> None:
        """Store what was counted after the commit."""
        if usage is None:
            return
        try:
            await self._db_thread.run(self._store.set_usage, snapshot_id, usage)
        except LazysnapError as error:
            _log.warning("cannot store what a snapshot takes", snapshot=snapshot_id, error=error)

    async def _count_all(self, snapshot_ids: Sequence[int]) -> None:
        for snapshot_id in snapshot_ids:
            await self.store_usage(snapshot_id, await self.count(snapshot_id))
