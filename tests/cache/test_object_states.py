# SPDX-License-Identifier: Apache-2.0
"""Drives the store through its table of states, which is read from the docstring that has it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazysnap.cache import object_states, stamps
from lazysnap.cache.object_states import State
from lazysnap.cache.objects import ObjectStore
from lazysnap.cache.stamps import seal_time

DATA = b"the content of a file\n" * 1000
KEY = hashlib.sha256(DATA).digest()


def _again(store: ObjectStore) -> ObjectStore:
    return ObjectStore(store.root, store.aside)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = ObjectStore(str(tmp_path / "objects"), str(tmp_path / "aside"))
    yield store
    store.close()


def _table() -> dict[tuple[State, str], State]:
    """(state, verb) -> state; a verb with a star is one while objects are held."""
    found: dict[tuple[State, str], State] = {}
    columns: list[str] = []
    for line in (object_states.__doc__ or "").splitlines():
        verbs, cells = line[4:22].strip(), line[22:].split()
        if verbs == "verb":
            columns = cells
        elif not line.startswith("    "):
            columns = []
        elif columns:
            for before, after in zip(columns, cells, strict=True):
                for verb in verbs.split(", "):
                    state = State[before if after == "." else after]
                    assert found.setdefault((State[before], verb), state) is state
    return found


def _held_new(store: ObjectStore) -> None:
    store.hold_above = 0
    store.put(KEY, DATA)


def _held(store: ObjectStore) -> None:
    _held_new(store)
    store.seal()


def _on_probation(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()
    store.put_on_probation(KEY)


def _distrusted(store: ObjectStore) -> None:
    _again(store).put(KEY, DATA)
    store.recover()


def _sealed(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()


_REACH: dict[State, Callable[[ObjectStore], object]] = {
    State.ABSENT: lambda store: None,
    State.UNVERIFIED: lambda store: _again(store).put(KEY, DATA),
    State.NEW: lambda store: store.put(KEY, DATA),
    State.SEALED: _sealed,
    State.DISTRUSTED: _distrusted,
    State.HELD_NEW: _held_new,
    State.HELD: _held,
    State.ON_PROBATION: _on_probation,
}


def _adopt(store: ObjectStore) -> None:
    complete = Path(store.root).with_name("complete")
    complete.write_bytes(DATA)
    assert store.adopt(str(complete), KEY)


def _open(store: ObjectStore) -> None:
    usable = store.state(KEY) not in (State.ABSENT, State.UNVERIFIED, State.DISTRUSTED)
    fd = store.open(KEY, len(DATA))
    assert (fd is not None) == usable
    if fd is not None:
        os.close(fd)


_VERBS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda store: store.put(KEY, DATA),
    "adopt": _adopt,
    "verify": lambda store: store.verify(KEY),
    "open": _open,
    "seal": lambda store: store.seal(),
    "release": lambda store: store.release(),
    "hold": lambda store: store.hold(KEY),
    "put_on_probation": lambda store: store.put_on_probation(KEY),
    "distrust": lambda store: store.distrust(KEY),
    "distrust_new": lambda store: store.distrust_new(),
    "recover": lambda store: store.recover(),
    "remove": lambda store: store.remove(KEY),
}
_CASES = [*_VERBS, "put*", "adopt*", "seal*", "release*", "crash"]


def test_no_pair_is_missing_from_the_table() -> None:
    assert set(_table()) == {(state, verb) for state in State for verb in _CASES}


def test_no_verb_of_the_store_is_missing_from_the_table() -> None:
    asks = {"close", "exists", "generation", "name", "note_removal", "path", "state"}
    public = {name for name, what in vars(ObjectStore).items() if name[0] != "_" and callable(what)}
    assert public - asks == set(_VERBS)


@pytest.mark.parametrize("verb", _CASES)
@pytest.mark.parametrize("state", State)
def test_a_verb_leads_to_the_state_of_the_table(
    store: ObjectStore, state: State, verb: str
) -> None:
    _REACH[state](store)
    assert store.state(KEY) is state
    store.hold_above = 0 if verb.endswith("*") else None
    if verb == "crash":
        store = _again(store)
    else:
        _VERBS[verb.removesuffix("*")](store)
    assert store.state(KEY) is _table()[state, verb]


@pytest.mark.parametrize("state", [state for state in State if state is not State.ABSENT])
def test_verifying_wrong_bytes_makes_any_object_absent(store: ObjectStore, state: State) -> None:
    _REACH[state](store)
    path = Path(store.path(KEY))
    modified = path.stat().st_mtime_ns
    path.write_bytes(DATA[::-1])
    os.utime(path, ns=(modified, modified))
    assert store.state(KEY) is state
    assert not store.verify(KEY)
    assert store.state(KEY) is State.ABSENT


def test_a_distrusted_object_is_not_believed_for_its_seal(store: ObjectStore) -> None:
    """It was changed, and sealed before the change was noticed."""
    _sealed(store)
    with Path(store.path(KEY)).open("r+b") as file:
        file.write(b"THE")
    os.utime(store.path(KEY), ns=(0, seal_time(KEY)))
    store.distrust(KEY)
    assert store.open(KEY, len(DATA)) is None
    assert not store.verify(KEY)


def test_an_object_that_is_distrusted_meanwhile_is_not_sealed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, DATA)
    seal = stamps.seal

    def seal_and_distrust(fd: int, key: bytes) -> None:
        store.distrust(KEY)
        seal(fd, key)

    monkeypatch.setattr(stamps, "seal", seal_and_distrust)
    assert store.seal() == 0
    assert store.state(KEY) is State.DISTRUSTED


def test_what_was_held_and_then_changed_is_not_shown_again(store: ObjectStore) -> None:
    _sealed(store)
    store.hold(KEY)
    _again(store).recover()
    with Path(store.path(KEY)).open("r+b") as file:
        file.write(b"THE")
    store.distrust(KEY)
    store.seal()
    assert store.state(KEY) is State.DISTRUSTED


def test_a_wrong_file_aside_is_not_sealed_with_the_one_that_was_stored_anew(
    store: ObjectStore,
) -> None:
    _sealed(store)
    with Path(store.path(KEY)).open("r+b") as file:
        file.write(b"THE")
    store.distrust(KEY)
    aside = Path(store.path(KEY))
    os.utime(aside, ns=(0, time.time_ns() - 10**9))
    store.put(KEY, DATA)
    store.seal()
    assert not aside.exists()
    assert Path(store.path(KEY)).read_bytes() == DATA
    assert _again(store).verify(KEY)


def test_what_is_stored_while_objects_are_held_replaces_a_wrong_one_that_is_shown(
    store: ObjectStore,
) -> None:
    shown = Path(store.path(KEY))
    shown.write_bytes(DATA[::-1])
    _held_new(store)
    fd = store.open(KEY, len(DATA))
    assert fd is not None
    with os.fdopen(fd, "rb") as file:
        assert file.read() == DATA
    assert not shown.exists()
