# SPDX-License-Identifier: Apache-2.0
"""The tables of metadata.db, and how an older file becomes a current one.

`PRAGMA user_version` counts the migrations that a file has had. A released migration is never
edited; a change is a new one at the end of the list. Knows nothing of what the rows mean to the
rest of the program.
"""

from __future__ import annotations

import os
import sqlite3

from lazysnap.errors import Internal

_INITIAL = """
CREATE TABLE snapshots (
    -- the snapshot's number and the name of its directory; AUTOINCREMENT: never used twice, so a
    -- left-over directory or mount can never be taken for that of a younger snapshot
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- key of an active snapshot or view, name of a committed one: one key space, opaque to us
    name TEXT NOT NULL UNIQUE,
    -- the API's numbers: 1 view, 2 active, 3 committed
    kind INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
    -- the committed snapshot below; NULL at the bottom; a parent cannot go before its children
    parent_id INTEGER REFERENCES snapshots (id) ON DELETE RESTRICT,
    -- nanoseconds since 1970, UTC
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    -- what a committed snapshot takes by itself, without its parents: bytes of disk blocks and
    -- inodes; NULL while it has not been measured; zero for views
    size INTEGER,
    inodes INTEGER
) STRICT;

-- children of a snapshot; without it each removal would read the whole table
CREATE INDEX snapshots_by_parent ON snapshots (parent_id);

CREATE TABLE labels (
    snapshot_id INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    -- never empty: containerd takes an empty value as "no label"
    value TEXT NOT NULL CHECK (value <> ''),
    PRIMARY KEY (snapshot_id, key)
) STRICT, WITHOUT ROWID;

-- the lazy snapshots, and what is served for them
CREATE TABLE attachments (
    snapshot_id INTEGER PRIMARY KEY REFERENCES snapshots (id) ON DELETE CASCADE,
    -- directory of the layer in its shard's mount, part of the inode numbers of its files
    slot INTEGER NOT NULL UNIQUE,
    -- number of the shard that serves it
    shard INTEGER NOT NULL,
    -- digest of the compressed layer
    layer_digest TEXT NOT NULL,
    -- what the shard must be told to serve it again; opaque to the store
    record BLOB NOT NULL
) STRICT;

-- numbers that only grow
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    -- the last number that was given out
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO counters VALUES ('slot', 0);
"""

_MIGRATIONS = (_INITIAL,)
_BUSY_SECONDS = 10.0


def connect(path: str) -> sqlite3.Connection:
    """Open the database, make it if there is none, and bring its tables up to date.

    Args:
        path: the file; its directory must exist.

    Returns:
        A connection in autocommit mode that may move between threads, if one at a time uses it.

    Raises:
        Internal: it cannot be opened, is damaged, or a newer release has written it.
    """
    try:
        # SQLite would make it with the umask's mode, and its -wal and -shm files with this one's
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)
        connection = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _configure(connection)
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise Internal(
            f"cannot open the database {path}: {error}",
            hint="if the file is damaged, move it and the snapshots directory away together",
            reason="database",
        ) from error
    return connection


def connect_read_only(path: str) -> sqlite3.Connection:
    """Open a database as it is, for reading only.

    Args:
        path: of the file, which is there.

    Returns:
        A connection in autocommit mode.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    # https://www.sqlite.org/uri.html
    escaped = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    address = f"file:{escaped}?mode=ro"
    return sqlite3.connect(address, uri=True, isolation_level=None, timeout=_BUSY_SECONDS)


def _configure(connection: sqlite3.Connection) -> None:
    # readers of other processes (lazysnap status) do not block the daemon
    connection.execute("PRAGMA journal_mode = WAL")
    # a committed transaction survives a power cut
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise Internal(
            f"{path} was written by a newer release (version {version} of its tables,"
            f" this release knows {len(_MIGRATIONS)})",
            hint="install that release again",
            reason="database-too-new",
        )
    for number in range(version, len(_MIGRATIONS)):
        # one transaction with the version, so that a crash leaves the old state or the new
        connection.executescript(
            f"BEGIN IMMEDIATE; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
        )
