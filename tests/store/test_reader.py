# SPDX-License-Identifier: Apache-2.0
"""Reading a database that belongs to somebody else, or to nobody any more."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lazysnap.store.reader import SnapshotReader
from lazysnap.store.snapshots import SnapshotStore


@pytest.mark.parametrize("name", ["metadata.db", "a?mode=rw&b.db", "50%20.db", "a#b.db"])
def test_any_path_is_opened(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    SnapshotStore(path).close()
    reader = SnapshotReader.open_read_only(path)
    assert reader is not None
    with closing(reader):
        assert (reader.ids(), reader.damage(3)) == (set(), [])


def test_none_is_made(tmp_path: Path) -> None:
    assert SnapshotReader.open_read_only(str(tmp_path / "metadata.db")) is None
    assert list(tmp_path.iterdir()) == []


def test_an_old_one_is_not_migrated(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.touch()
    reader = SnapshotReader.open_read_only(str(path))
    assert reader is not None
    with closing(reader):
        assert reader.damage(3) == []
    assert path.read_bytes() == b""


def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.write_bytes(b"no database at all, whatever it is called" * 100)
    reader = SnapshotReader.open_read_only(str(path))
    assert reader is not None
    with closing(reader), pytest.raises(sqlite3.DatabaseError):
        reader.damage(3)
