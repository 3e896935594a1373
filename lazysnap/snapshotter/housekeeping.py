# SPDX-License-Identifier: Apache-2.0
"""Work in the background: deleting garbage and measuring what snapshots take on disk.

The next start finds again what is left undone when the process ends. Garbage is every directory that the
database does not know, and a snapshot that was not measured has no usage there.
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
    """The usage of one snapshot, which is measured while the snapshot is committed."""

    def __init__(self) -> None:
        self._measured = trio.Event()
        self._usage: Usage | None = None
        self._taken = False
        self._committed = trio.Event()
        self._scope = trio.CancelScope()

    async def take(self, limit: float) -> Usage | None:
        """The usage, which the caller stores.

        Args:
            limit: how long to wait, in seconds.

        Returns:
            None if measuring takes longer or fails. Then the usage is stored later, if at all.
        """
        with trio.move_on_after(limit):
            await self._measured.wait()
        self._taken = self._usage is not None
        return self._usage

    async def run(self, housekeeping: Housekeeping, snapshot_id: int) -> None:
        """Measure, and store the usage unless the caller has taken it."""
        with self._scope:
            self._usage = await housekeeping.measure(snapshot_id)
            self._measured.set()
            await self._committed.wait()
            if not self._taken:
                await housekeeping.store_usage(snapshot_id, self._usage)

    def end(self, *, committed: bool) -> None:
        """The commit has ended: store the usage if the snapshot was committed, forget it otherwise."""
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
        # Directories that are being built and have no number yet.
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
                    nursery.start_soon(self._measure_all, unmeasured)
                    task_status.started()
        finally:
            self._stopped.set()

    async def aclose(self) -> None:
        """Stop; takes as long as deleting or measuring one directory."""
        self._scope.cancel()
        if self._nursery is not None:
            await self._stopped.wait()

    # -- garbage ----------------------------------------------------------------------------------

    @contextmanager
    def building(self) -> Iterator[str]:
        """A name for a directory that the body builds.

        The directory is garbage afterwards, unless it has got a number.
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
        # Runs as one function of the database's thread, so that no directory can get its number between
        # the steps. A number can come again after a transaction that failed, so a directory is never
        # deleted while it has one.
        return [
            self._dirs.discard(name) if name.isdecimal() else name
            for name in garbage(self._dirs.names(), self._store.ids())
        ]

    async def _collect_when_expected(self) -> None:
        while True:
            await self._garbage_expected.wait()
            # The event is replaced here alone: if `collect` did it, this task would wait for an old one.
            self._garbage_expected = trio.Event()
            try:
                await self.collect()
            except LazysnapError as error:
                _log.warning("cannot look for left-over directories", error=error)

    # -- usage ------------------------------------------------------------------------------------

    @contextmanager
    def measuring(self, snapshot_id: int) -> Iterator[Measurement]:
        """Measure a snapshot while the body commits it."""
        assert self._nursery is not None, "not running"
        measurement = Measurement()
        self._nursery.start_soon(measurement.run, self, snapshot_id)
        try:
            yield measurement
        except BaseException:
            measurement.end(committed=False)
            raise
        measurement.end(committed=True)

    async def measure(self, snapshot_id: int) -> Usage | None:
        """The usage of a snapshot, or None if it cannot be measured."""
        try:
            return await trio.to_thread.run_sync(
                directory_tree.measure, self._dirs.fs(snapshot_id), trio.from_thread.check_cancelled
            )
        except LazysnapError as error:
            _log.warning("cannot count what a snapshot takes", snapshot=snapshot_id, error=error)
            return None

    async def store_usage(self, snapshot_id: int, usage: Usage | None) -> None:
        """Store a usage that was measured after the commit."""
        if usage is None:
            return
        try:
            await self._db_thread.run(self._store.set_usage, snapshot_id, usage)
        except LazysnapError as error:
            _log.warning("cannot store what a snapshot takes", snapshot=snapshot_id, error=error)

    async def _measure_all(self, snapshot_ids: Sequence[int]) -> None:
        for snapshot_id in snapshot_ids:
            await self.store_usage(snapshot_id, await self.measure(snapshot_id))
