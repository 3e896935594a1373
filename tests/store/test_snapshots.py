# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap import filters
from lazysnap.errors import AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound
from lazysnap.overlay import Kind
from lazysnap.store.reader import PAGE
from lazysnap.store.records import Attachment, Usage
from lazysnap.store.snapshots import SnapshotStore


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000_123_456_789

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[SnapshotStore]:
    opened = SnapshotStore(str(tmp_path / "metadata.db"), now=clock)
    yield opened
    opened.close()


def make(
    store: SnapshotStore,
    name: str,
    parent: str = "",
    kind: Kind = Kind.ACTIVE,
    labels: dict[str, str] | None = None,
) -> int:
    with store.creating(kind, name, parent, labels or {}) as number:
        pass
    return number


def committed(store: SnapshotStore, name: str, parent: str = "") -> int:
    make(store, f"active {name}", parent)
    return store.commit(name, f"active {name}", usage=Usage(1, 1)).id


def attachment(slot: int) -> Attachment:
    return Attachment(slot, slot % 2, f"sha256:{slot}", bytes([slot]))


def test_a_snapshot_is_as_it_was_made(store: SnapshotStore, clock: Clock) -> None:
    base = committed(store, "base")
    before = clock.now
    number = make(store, "key with space/é", "base", labels={"a": "1", "empty": ""})
    found = store.stat("key with space/é")
    assert (found.id, found.parent, found.kind) == (number, "base", Kind.ACTIVE)
    assert found.created_ns == found.updated_ns == before + 1
    assert found.labels == {"a": "1"}
    assert found.usage is None
    assert store.lineage(found.name).ancestors == (base,)


def test_errors_of_creating_in_their_order(store: SnapshotStore) -> None:
    make(store, "active")
    committed(store, "base")
    for kind, name, parent, error in [
        (Kind.COMMITTED, "active", "missing", InvalidArgument),
        (Kind.ACTIVE, "active", "missing", NotFound),
        (Kind.VIEW, "active", "active", InvalidArgument),
        (Kind.VIEW, "active", "base", AlreadyExists),
        (Kind.ACTIVE, "base", "", AlreadyExists),
        (Kind.ACTIVE, "", "", InvalidArgument),
    ]:
        with pytest.raises(error):
            make(store, name, parent, kind)
        if kind is not Kind.COMMITTED:
            with pytest.raises(error):
                store.check_new(name, parent)
    replaced = store.creating(Kind.ACTIVE, "x", "base", parent_id=77)
    with pytest.raises(NotFound, match="made anew"), replaced:
        pass


def test_nothing_exists_when_the_body_fails(store: SnapshotStore) -> None:
    with pytest.raises(ZeroDivisionError), store.creating(Kind.ACTIVE, "key", "", {"a": "b"}):
        raise ZeroDivisionError
    with pytest.raises(NotFound):
        store.stat("key")
    assert store.ids() == set()


def test_a_commit_keeps_the_number_and_nothing_else(store: SnapshotStore, clock: Clock) -> None:
    number = make(store, "key", labels={"old": "1", "kept": "2"})
    before = clock.now
    found = store.commit("name", "key", labels={"new": "3"}, usage=Usage(5, 6), keep=("kept", "no"))
    assert found == store.stat("name")
    assert (found.id, found.kind, found.usage) == (number, Kind.COMMITTED, Usage(5, 6))
    assert found.labels == {"new": "3", "kept": "2"}
    assert found.created_ns == found.updated_ns == before + 1
    with pytest.raises(NotFound):
        store.stat("key")


def test_errors_of_commit_in_their_order(store: SnapshotStore) -> None:
    committed(store, "base")
    committed(store, "other")
    make(store, "view", "base", Kind.VIEW)
    make(store, "on base", "base")
    make(store, "alone")
    for name, key, parent, error in [
        ("base", "missing", "", AlreadyExists),
        ("on base", "on base", "", AlreadyExists),
        ("", "alone", "", InvalidArgument),
        ("new", "missing", "missing", NotFound),
        ("new", "view", "", FailedPrecondition),
        ("new", "base", "", FailedPrecondition),
        ("new", "on base", "other", InvalidArgument),
        ("new", "alone", "missing", NotFound),
        ("new", "alone", "view", FailedPrecondition),
    ]:
        with pytest.raises(error):
            store.commit(name, key, parent=parent)
        with pytest.raises(error):
            store.check_commit(name, key, parent)
    assert store.stat("alone").kind is Kind.ACTIVE
    assert store.commit("one", "on base", parent="base").parent == "base"
    assert store.commit("two", "alone", parent="base").parent == "base"


def test_remove(store: SnapshotStore) -> None:
    number = committed(store, "base")
    child = make(store, "child", "base")
    with pytest.raises(NotFound):
        store.remove("missing")
    with pytest.raises(FailedPrecondition, match="cannot remove snapshot 'base' with child"):
        store.remove("base")
    assert store.remove("child") == (child, None)
    assert store.remove("base") == (number, None)
    assert make(store, "base") > child, "a number was used twice"


def test_numbers_are_not_used_again_after_a_restart(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        store = SnapshotStore(str(tmp_path / "db"))
        assert make(store, "key") == expected
        assert store.next_slot() == expected
        store.remove("key")
        store.close()


def test_update(store: SnapshotStore, clock: Clock) -> None:
    made = make(store, "key", labels={"a": "1", "b": "2"})
    created = store.stat("key").created_ns
    found = store.update("key", {"a": "9", "b": "", "d.e/f": "4"}, ["labels.a", "labels.d.e/f"])
    assert found.labels == {"a": "9", "b": "2", "d.e/f": "4"}
    assert found == store.stat("key")
    assert (found.id, found.created_ns) == (made, created)
    assert found.updated_ns == clock.now > created
    assert store.update("key", {}, ["labels.a"]).labels == {"b": "2", "d.e/f": "4"}
    assert store.update("key", {"z": "1", "y": ""}).labels == {"z": "1"}
    assert store.update("key", {"w": "1"}, ["labels", "labels.z"]).labels == {"w": "1"}
    for path in ("parent", "kind", "name", "created_at", "", "label", "labelsx", "labels."):
        with pytest.raises(InvalidArgument):
            store.update("key", {"w": "2", "": "3"}, ["labels.w", path])
    assert store.stat("key").labels == {"w": "1"}, "a refused update changed something"
    with pytest.raises(NotFound):
        store.update("missing", {}, ["parent"])


def test_time_does_not_run_backwards(store: SnapshotStore, clock: Clock) -> None:
    make(store, "key")
    clock.now -= 1_000_000_000
    assert store.update("key", {}).updated_ns == store.stat("key").created_ns


def test_walk_in_pages(store: SnapshotStore) -> None:
    names = [f"key {i}" for i in range(2 * PAGE + 5)]
    for name in names:
        make(store, name)
    assert [each.name for each in store.walk()] == sorted(names)
    seen = []
    for each in store.walk():
        # no transaction is open while the consumer does what it likes
        store.update(each.name, {"seen": "yes"})
        if each.name == "key 0":
            store.remove("key 99")
        seen.append(each.name)
    # the page in memory may still have it
    assert set(names) - {"key 99"} <= set(seen)
    assert len(seen) == len(set(seen))


def test_walk_of_an_exact_page(store: SnapshotStore) -> None:
    for i in range(PAGE):
        make(store, f"key {i}")
    assert len(list(store.walk())) == PAGE


def test_filters(store: SnapshotStore) -> None:
    committed(store, "base")
    committed(store, "mid", "base")
    make(store, "a", "base", labels={"x.y": "1"})
    make(store, "v", "mid", Kind.VIEW, {"x.y": "2"})

    def names(*texts: str) -> list[str]:
        return [each.name for each in store.walk(filters.compile(texts))]

    assert names() == ["a", "base", "mid", "v"]
    assert names("kind==active") == ["a"]
    assert names("kind==view", "kind==active") == ["a", "v"]
    assert names("parent==base") == ["a", "mid"]
    assert names("parent==base,kind==committed") == ["mid"]
    assert names("parent==missing") == []
    assert names('parent==""') == ["base"]
    assert names("name==v") == ["v"]
    assert names("name==v,parent==base") == []
    assert names("labels.x.y") == ["a", "v"]
    assert names('labels."x.y"==2') == ["v"]
    assert names("labels") == []
    assert names("created") == []


def test_usage(store: SnapshotStore) -> None:
    make(store, "view", kind=Kind.VIEW)
    assert store.stat("view").usage == Usage(0, 0)
    make(store, "key")
    number = store.commit("name", "key").id
    assert store.stat("name").usage is None
    assert store.unmeasured() == [number]
    store.set_usage(number, Usage(7, 8))
    assert store.stat("name").usage == Usage(7, 8)
    assert store.unmeasured() == []
    store.set_usage(12345, Usage(1, 1))


def test_remote_snapshots(store: SnapshotStore) -> None:
    slots = [store.next_slot(), store.next_slot()]
    labels = {"containerd.io/snapshot.ref": "sha256:1"}
    with store.committing_remote("one", "", labels, attachment(slots[0])) as first:
        pass
    middle = committed(store, "middle", "one")
    with store.committing_remote("two", "middle", {}, attachment(slots[1])) as second:
        pass
    found = store.stat("one")
    assert (found.kind, found.labels) == (Kind.COMMITTED, labels)
    lineage = store.lineage("two")
    assert lineage.ancestors == (middle, first)
    assert list(lineage.attachments.items()) == [
        (second, attachment(slots[1])),
        (first, attachment(slots[0])),
    ]
    assert store.attachments() == dict(sorted(lineage.attachments.items()))
    replaced = Attachment(store.next_slot(), 0, "sha256:x", b"new")
    store.attach(first, replaced)
    assert store.attachments()[first] == replaced
    with pytest.raises(AlreadyExists, match="slot"):
        store.attach(second, replaced)
    with pytest.raises(NotFound):
        store.attach(999, attachment(99))
    assert store.remove("two") == (second, attachment(slots[1]))
    assert list(store.attachments()) == [first]


def test_errors_of_remote_snapshots_leave_nothing(store: SnapshotStore) -> None:
    make(store, "active")
    number = committed(store, "base")
    for name, parent, parent_id, error in [
        ("base", "", None, AlreadyExists),
        ("new", "missing", None, NotFound),
        ("new", "active", None, InvalidArgument),
        ("new", "base", number + 100, NotFound),
    ]:
        making = store.committing_remote(name, parent, {}, attachment(1), parent_id=parent_id)
        with pytest.raises(error), making:
            pass
    with pytest.raises(ZeroDivisionError), store.committing_remote("new", "", {}, attachment(1)):
        raise ZeroDivisionError
    assert store.attachments() == {}
    assert len(store.ids()) == 2


def test_a_long_chain(store: SnapshotStore) -> None:
    parent, numbers = "", []
    for i in range(300):
        numbers.append(committed(store, f"layer {i}", parent))
        parent = f"layer {i}"
    assert store.lineage(parent).ancestors == tuple(reversed(numbers[:-1]))


def test_a_second_process_may_read(store: SnapshotStore, tmp_path: Path) -> None:
    make(store, "key")
    with store.creating(Kind.ACTIVE, "other", "", {}):
        reader = sqlite3.connect(f"file:{tmp_path}/metadata.db?mode=ro", uri=True)
        assert reader.execute("SELECT name FROM snapshots").fetchall() == [("key",)]
        reader.close()


def test_private_and_durable(store: SnapshotStore, tmp_path: Path) -> None:
    for file in tmp_path.glob("metadata.db*"):
        assert file.stat().st_mode & 0o777 == 0o600, file
    (mode,) = store._db.execute("PRAGMA synchronous").fetchone()
    assert mode == 2  # FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA foreign_keys").fetchone() == (1,)


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "db").write_bytes(content)
    with pytest.raises(Internal, match="cannot open the database"):
        SnapshotStore(str(tmp_path / "db"))


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    SnapshotStore(str(tmp_path / "db")).close()
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("PRAGMA user_version = 1000")
    connection.close()
    with pytest.raises(Internal, match="newer release"):
        SnapshotStore(str(tmp_path / "db"))


def test_damage_that_shows_later_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "db"
    store = SnapshotStore(str(path))
    for i in itertools.count():
        make(store, f"{i:0500}")
        if i == 200:
            break
    store.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))
    store = SnapshotStore(str(path))
    with pytest.raises(Internal, match="the database failed"):
        list(store.walk())
    store.close()
