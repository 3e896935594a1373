# SPDX-License-Identifier: Apache-2.0
"""The snapshots of a root directory: names, parents, labels, sizes and what is served lazily.

The rules are those of containerd's metadata store for snapshotters (core/snapshots/storage/bolt.go):
which error comes first, what a commit keeps, what an update may change. Does no I/O but the
database's and knows nothing of directories or mounts.

Every method is one transaction and blocks. A store is used by one thread at a time; the caller sees
to that. No transaction is open while a caller's code runs, but for the body of `creating` and
`committing_remote`, which is meant to be one rename.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lazysnap.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from lazysnap.overlay import Kind
from lazysnap.store.reader import SnapshotReader
from lazysnap.store.records import NO_LABELS, Attachment, Snapshot, Usage
from lazysnap.store.schema import connect


class SnapshotStore(SnapshotReader):
    """The database of one root directory.

    Args:
        path: the file; made if missing.
        now: nanoseconds since 1970, UTC.

    Raises:
        Internal: the file cannot be used.
    """

    def __init__(self, path: str, *, now: Callable[[], int] = time.time_ns) -> None:
        super().__init__(connect(path))
        self._now = now

    # -- the life of a snapshot -------------------------------------------------------------------

    @contextmanager
    def creating(
        self,
        kind: Kind,
        name: str,
        parent: str = "",
        labels: Mapping[str, str] = NO_LABELS,
        *,
        parent_id: int | None = None,
    ) -> Iterator[int]:
        """Make an active snapshot or a view; it exists when the body has ended without an error.

        Args:
            kind: `ACTIVE` or `VIEW`.
            name: its key.
            parent: a committed snapshot, or empty.
            labels: all of its labels.
            parent_id: the number that the parent must have, if the caller has looked at it before.

        Yields:
            The number of the new snapshot. If the body fails, the number may be given out again.

        Raises:
            InvalidArgument: the kind or the key is not allowed, or the parent is not committed.
            NotFound: there is no such parent, or no longer.
            AlreadyExists: the key is taken.
        """
        if kind not in (Kind.ACTIVE, Kind.VIEW):
            raise InvalidArgument(f"snapshot {name!r} cannot be created as {kind.name.lower()}")
        usage = Usage(0, 0) if kind is Kind.VIEW else None
        with self._transaction():
            yield self._insert(kind, name, (parent, parent_id), labels, usage)

    @contextmanager
    def committing_remote(
        self,
        name: str,
        parent: str,
        labels: Mapping[str, str],
        attachment: Attachment,
        *,
        parent_id: int | None = None,
    ) -> Iterator[int]:
        """Make a committed lazy snapshot at once, so that nobody ever sees it active.

        Args:
            name: its name.
            parent: a committed snapshot, or empty.
            labels: all of its labels.
            attachment: what is served for it.
            parent_id: the number that the parent must have, if the caller has looked at it before.

        Yields:
            The number of the new snapshot. If the body fails, the number may be given out again.

        Raises:
            InvalidArgument: the name is not allowed, or the parent is not committed.
            NotFound: there is no such parent, or no longer.
            AlreadyExists: the name is taken.
        """
        with self._transaction():
            number = self._insert(Kind.COMMITTED, name, (parent, parent_id), labels, Usage(0, 0))
            self._attach(number, attachment)
            yield number

    @contextmanager
    def committing(
        self,
        name: str,
        parent: str,
        labels: Mapping[str, str],
        usage: Usage,
        *,
        parent_id: int | None = None,
    ) -> Iterator[int]:
        """Make a committed snapshot of a finished directory; otherwise as `committing_remote`.

        Args:
            name: its name.
            parent: a committed snapshot, or empty.
            labels: all of its labels.
            usage: what it takes.
            parent_id: the number that the parent must have, if the caller has looked at it before.

        Yields:
            The number of the new snapshot. If the body fails, the number may be given out again.
        """
        with self._transaction():
            yield self._insert(Kind.COMMITTED, name, (parent, parent_id), labels, usage)

    def commit(
        self,
        name: str,
        key: str,
        *,
        labels: Mapping[str, str] = NO_LABELS,
        usage: Usage | None = None,
        parent: str = "",
        keep: Sequence[str] = (),
    ) -> Snapshot:
        """Turn an active snapshot into a committed one.

        Args:
            name: its new name; the key is free afterwards.
            key: the active snapshot.
            labels: its labels from now on; those it had are dropped.
            usage: what it takes, or None to tell later with `set_usage`.
            parent: for an active snapshot without a parent, the one to put it on.
            keep: labels that stay although the request does not have them.

        Returns:
            The committed snapshot.

        Raises:
            AlreadyExists: the name is taken (this is looked at first).
            NotFound: there is no such key or parent.
            FailedPrecondition: the key is not active, or the parent not committed.
            InvalidArgument: the name is not allowed, or the snapshot has another parent.
        """
        with self._transaction():
            active, parent_id = self._check_commit(name, key, parent)
            kept = {k: active.labels[k] for k in keep if k in active.labels}
            now = self._now()
            self._db.execute(
                "UPDATE snapshots SET name = ?, kind = ?, created_ns = ?, updated_ns = ?,"
                " size = ?, inodes = ?, parent_id = coalesce(parent_id, ?) WHERE id = ?",
                (name, Kind.COMMITTED, now, now, *_columns(usage), parent_id, active.id),
            )
            self._set_labels(active.id, {**kept, **labels})
            return self._get(name)

    def check_new(self, name: str, parent: str = "") -> None:
        """Raise what `creating` would raise now, so that no work is begun in vain."""
        with self._transaction(write=False):
            self._check_new(name, parent, None)

    def check_commit(self, name: str, key: str, parent: str = "") -> Snapshot:
        """Raise what `commit` would raise now, so that no work is begun in vain.

        Returns:
            The active snapshot.
        """
        with self._transaction(write=False):
            return self._check_commit(name, key, parent)[0]

    def remove(self, name: str) -> tuple[int, Attachment | None]:
        """Forget a snapshot.

        Returns:
            Its number, which is never used again, and what was served for it if it was lazy.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it is the parent of another.
        """
        with self._transaction():
            found = self._get(name)
            child = self._db.execute(
                "SELECT name FROM snapshots WHERE parent_id = ? LIMIT 1", (found.id,)
            ).fetchone()
            if child is not None:
                # containerd's test suite looks for the word "remove"
                raise FailedPrecondition(
                    f"cannot remove snapshot {name!r} with child {child[0]!r}",
                    hint="remove its children first",
                )
            row = self._db.execute(
                "SELECT slot, shard, layer_digest, record FROM attachments WHERE snapshot_id = ?",
                (found.id,),
            ).fetchone()
            self._db.execute("DELETE FROM snapshots WHERE id = ?", (found.id,))
            return found.id, None if row is None else Attachment(*row)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> Snapshot:
        """Change labels.

        Args:
            name: the snapshot.
            labels: their new values; an empty value deletes a label.
            paths: `labels` to replace all, `labels.<key>` to set that one; none to replace all.

        Returns:
            The snapshot as it is now.

        Raises:
            NotFound: there is none.
            InvalidArgument: a path names something that cannot be changed.
        """
        with self._transaction():
            found = self._get(name)
            changed = dict(found.labels)
            for path in paths or ("labels",):
                if path == "labels":
                    changed = dict(labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    changed[key] = labels.get(key, "")
                else:
                    raise InvalidArgument(f"cannot update {path!r} of snapshot {name!r}")
            # never backwards, even if the clock was set back
            now = max(self._now(), found.updated_ns)
            self._db.execute("UPDATE snapshots SET updated_ns = ? WHERE id = ?", (now, found.id))
            self._set_labels(found.id, changed)
            return self._get(name)

    def set_usage(self, snapshot_id: int, usage: Usage) -> None:
        """Store what a committed snapshot takes; nothing happens if it is gone."""
        with self._transaction():
            self._db.execute(
                "UPDATE snapshots SET size = ?, inodes = ? WHERE id = ?",
                (*_columns(usage), snapshot_id),
            )

    # -- lazy snapshots ---------------------------------------------------------------------------

    def next_slot(self) -> int:
        """A slot number that was never given out before, starting with 1."""
        with self._transaction():
            (value,) = self._db.execute(
                "UPDATE counters SET value = value + 1 WHERE name = 'slot' RETURNING value"
            ).fetchone()
            return int(value)

    def attach(self, snapshot_id: int, attachment: Attachment) -> None:
        """Set or replace what is served for a snapshot.

        Raises:
            NotFound: there is no such snapshot.
            AlreadyExists: another snapshot has the slot.
        """
        with self._transaction():
            self._attach(snapshot_id, attachment)

    # -- inside a transaction ---------------------------------------------------------------------

    def _check_new(self, name: str, parent: str, expected: int | None) -> int | None:
        """See that a snapshot can be made; the number of its parent."""
        parent_id = None
        if parent:
            below = self._get_parent(parent)
            if below.kind is not Kind.COMMITTED:
                raise InvalidArgument(f"parent {parent!r} is not a committed snapshot")
            parent_id = below.id
            if expected not in (None, parent_id):
                raise NotFound(f"parent snapshot {parent!r} was removed and made anew meanwhile")
        self._check_free(name)
        return parent_id

    def _check_free(self, name: str) -> None:
        if not name:
            raise InvalidArgument("a snapshot needs a key or name that is not empty")
        if self._db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
            raise AlreadyExists(f"snapshot {name!r} already exists")

    def _insert(
        self,
        kind: Kind,
        name: str,
        parent: tuple[str, int | None],
        labels: Mapping[str, str],
        usage: Usage | None,
    ) -> int:
        parent_id = self._check_new(name, *parent)
        now = self._now()
        cursor = self._db.execute(
            "INSERT INTO snapshots (name, kind, parent_id, created_ns, updated_ns, size, inodes)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, kind, parent_id, now, now, *_columns(usage)),
        )
        number = cursor.lastrowid
        assert number is not None
        self._set_labels(number, labels)
        return number

    def _get_parent(self, parent: str) -> Snapshot:
        try:
            return self._get(parent)
        except NotFound:
            raise NotFound(f"parent snapshot {parent!r} does not exist") from None

    def _check_commit(self, name: str, key: str, parent: str) -> tuple[Snapshot, int | None]:
        """See that a commit is allowed; the active snapshot and the parent it gets, if any."""
        self._check_free(name)
        active = self._get(key)
        if active.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {key!r} is not active")
        if not parent or parent == active.parent:
            return active, None
        if active.parent:
            raise InvalidArgument(
                f"snapshot {active.name!r} has the parent {active.parent!r}, not {parent!r}"
            )
        below = self._get_parent(parent)
        if below.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"parent {parent!r} is not a committed snapshot")
        return active, below.id

    def _set_labels(self, snapshot_id: int, labels: Mapping[str, str]) -> None:
        if "" in labels:
            raise InvalidArgument("a label needs a key that is not empty")
        self._db.execute("DELETE FROM labels WHERE snapshot_id = ?", (snapshot_id,))
        self._db.executemany(
            "INSERT INTO labels VALUES (?, ?, ?)",
            [(snapshot_id, key, value) for key, value in labels.items() if value],
        )

    def _attach(self, snapshot_id: int, attachment: Attachment) -> None:
        if not self._db.execute("SELECT 1 FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone():
            raise NotFound(f"there is no snapshot with number {snapshot_id}")
        try:
            self._db.execute(
                "INSERT INTO attachments VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (snapshot_id) DO UPDATE SET slot = excluded.slot,"
                " shard = excluded.shard, layer_digest = excluded.layer_digest,"
                " record = excluded.record",
                (
                    snapshot_id,
                    attachment.slot,
                    attachment.shard,
                    attachment.layer_digest,
                    attachment.record,
                ),
            )
        except sqlite3.IntegrityError as error:
            raise AlreadyExists(f"slot {attachment.slot} is in use") from error


def _columns(usage: Usage | None) -> tuple[int | None, int | None]:
    return (None, None) if usage is None else (usage.size, usage.inodes)
