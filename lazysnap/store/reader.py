# SPDX-License-Identifier: Apache-2.0
"""Reading the database of snapshots.

Every public method is one transaction and blocks. None leaves a transaction open while a caller's
code runs.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from lazysnap import filters
from lazysnap.errors import Internal, NotFound
from lazysnap.overlay import Kind
from lazysnap.store.records import Attachment, Lineage, Snapshot, Usage
from lazysnap.store.schema import connect_read_only

PAGE = 100
"""Snapshots in one page of a listing."""

_COLUMNS = "s.id, s.name, s.kind, p.name, s.created_ns, s.updated_ns, s.size, s.inodes"
_FROM = "FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id"
_ANCESTORS = """
WITH RECURSIVE chain (id, depth) AS (
    SELECT :id, 0
    UNION ALL
    SELECT s.parent_id, depth + 1 FROM chain JOIN snapshots s ON s.id = chain.id
    WHERE s.parent_id IS NOT NULL
)
SELECT chain.id, a.slot, a.shard, a.layer_digest, a.record
FROM chain LEFT JOIN attachments a ON a.snapshot_id = chain.id ORDER BY depth
"""


class SnapshotReader:
    """What can be asked of a database.

    Args:
        connection: in autocommit mode, to a database with current tables; closed by `close`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    def open_read_only(cls, path: str) -> SnapshotReader | None:
        """Open a database without making or migrating it, as `SnapshotStore` would; None if there is none.

        Raises:
            sqlite3.Error: it cannot be opened.
        """
        return cls(connect_read_only(path)) if os.path.exists(path) else None

    def close(self) -> None:
        """Close the file. May be called again."""
        self._db.close()

    def stat(self, name: str) -> Snapshot:
        """The snapshot with this key or name.

        Raises:
            NotFound: there is none.
        """
        with self._transaction(write=False):
            return self._get(name)

    def lineage(self, name: str) -> Lineage:
        """A snapshot, its ancestors, and what is served lazily for them.

        Raises:
            NotFound: there is none.
        """
        with self._transaction(write=False):
            found = self._get(name)
            rows = self._db.execute(_ANCESTORS, {"id": found.id}).fetchall()
        return Lineage(
            found,
            tuple(row[0] for row in rows[1:]),
            {row[0]: Attachment(*row[1:]) for row in rows if row[1] is not None},
        )

    def page(
        self, match: filters.Filter = filters.EVERYTHING, after: str | None = None
    ) -> tuple[list[Snapshot], str | None]:
        """One page of a listing, in the order of names.

        Args:
            match: which snapshots to return.
            after: what the previous page returned; None for the first.

        Returns:
            The matching snapshots among the next `PAGE` candidates, perhaps none of them, and where
            to go on, or None at the end.
        """
        where, values = _narrowed(match)
        if after is not None:
            where += " AND s.name > :after"
        with self._transaction(write=False):
            rows = self._db.execute(
                f"SELECT {_COLUMNS} {_FROM} WHERE {where} ORDER BY s.name LIMIT :limit",
                {**values, "after": after, "limit": PAGE},
            ).fetchall()
            found = self._with_labels(rows)
        end = found[-1].name if len(found) == PAGE else None
        return [each for each in found if match(each.field)], end

    def walk(self, match: filters.Filter = filters.EVERYTHING) -> Iterator[Snapshot]:
        """All matching snapshots, in the order of names.

        Snapshots made or removed meanwhile may be seen or not; each of the others is seen once.
        """
        after: str | None = None
        while True:
            found, after = self.page(match, after)
            yield from found
            if after is None:
                return

    def damage(self, most: int) -> list[str]:
        """What SQLite's own checks find; nothing if the file is sound.

        See https://www.sqlite.org/pragma.html#pragma_integrity_check.

        Args:
            most: after so many problems, the rest is not looked at.

        Raises:
            sqlite3.DatabaseError: the file is no database.
        """
        rows = self._db.execute(f"PRAGMA integrity_check({most})").fetchall()
        return [row[0] for row in rows if row[0] != "ok"] or [
            f"row {row[1]} of {row[0]} names one of {row[2]} that is not there"
            for row in self._db.execute("PRAGMA foreign_key_check").fetchmany(most)
        ]

    def ids(self) -> set[int]:
        """The numbers of all snapshots."""
        with self._transaction(write=False):
            return {row[0] for row in self._db.execute("SELECT id FROM snapshots")}

    def unmeasured(self) -> list[int]:
        """The numbers of committed snapshots whose usage is not known."""
        with self._transaction(write=False):
            rows = self._db.execute(
                "SELECT id FROM snapshots WHERE size IS NULL AND kind = ? ORDER BY id",
                (Kind.COMMITTED,),
            )
            return [row[0] for row in rows]

    def attachments(self) -> dict[int, Attachment]:
        """All lazy snapshots, by number."""
        with self._transaction(write=False):
            rows = self._db.execute(
                "SELECT snapshot_id, slot, shard, layer_digest, record FROM attachments"
                " ORDER BY snapshot_id"
            )
            return {row[0]: Attachment(*row[1:]) for row in rows}

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[None]:
        try:
            # a reader needs one too: it makes several statements one look at the database
            self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, such as a full disk
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise Internal(f"the database failed: {error}", reason="database") from error

    def _get(self, name: str) -> Snapshot:
        row = self._db.execute(
            f"SELECT {_COLUMNS} {_FROM} WHERE s.name = ?",
            (name,),
        ).fetchone()
        if row is None:
            raise NotFound(f"snapshot {name!r} does not exist")
        return self._with_labels([row])[0]

    def _with_labels(self, rows: Sequence[Any]) -> list[Snapshot]:
        labels: dict[int, dict[str, str]] = {}
        marks = ",".join("?" * len(rows))
        for snapshot_id, key, value in self._db.execute(
            f"SELECT snapshot_id, key, value FROM labels WHERE snapshot_id IN ({marks})",  # noqa: S608  # only question marks
            [row[0] for row in rows],
        ):
            labels.setdefault(snapshot_id, {})[key] = value
        return [_snapshot(row, labels.get(row[0], {})) for row in rows]


def _snapshot(row: Sequence[Any], labels: Mapping[str, str]) -> Snapshot:
    number, name, kind, parent, created, updated, size, inodes = row
    usage = None if size is None else Usage(size, inodes)
    return Snapshot(
        id=number,
        name=name,
        kind=Kind(kind),
        parent=parent or "",
        created_ns=created,
        updated_ns=updated,
        usage=usage,
        labels=MappingProxyType(labels),
    )


def _narrowed(match: filters.Filter) -> tuple[str, dict[str, object]]:
    """The part of a filter that an index answers, as SQL; containerd asks for a parent's children."""
    where = "TRUE"
    values: dict[str, object] = {}
    if (name := match.required.get(("name",))) is not None:
        where += " AND s.name = :name"
        values["name"] = name
    if (parent := match.required.get(("parent",))) == "":
        where += " AND s.parent_id IS NULL"
    elif parent is not None:
        where += " AND s.parent_id = (SELECT id FROM snapshots WHERE name = :parent)"
        values["parent"] = parent
    return where, values
