# SPDX-License-Identifier: Apache-2.0
"""Profiles on disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lazysnap.errors import FormatError, Internal
from lazysnap.prefetch.profile import Profile, Read
from lazysnap.prefetch.profile_store import ProfileStore

_MANIFEST = "sha256:" + "ab" * 32
_LAYER = "sha256:" + "cd" * 32


def _profile(*reads: Read, manifest: str = _MANIFEST) -> Profile:
    return Profile(manifest=manifest, command=["true"], layers={_LAYER: list(reads)})


def test_what_was_added_is_found_by_another_store(tmp_path: Path) -> None:
    profile = _profile(Read("a", 0, 10, 5))
    ProfileStore(str(tmp_path)).add(profile)
    store = ProfileStore(str(tmp_path))
    assert store.find(_MANIFEST) == profile
    assert store.manifests() == [_MANIFEST]
    store.remove(_MANIFEST)
    store.remove(_MANIFEST)
    assert store.find(_MANIFEST) is None
    assert store.manifests() == []


def test_adding_again_joins(tmp_path: Path) -> None:
    store = ProfileStore(str(tmp_path))
    store.add(_profile(Read("a", 0, 10, 5)))
    joined = store.add(_profile(Read("b", 0, 10, 1), Read("a", 5, 10, 9)))
    assert joined.layers[_LAYER] == [Read("b", 0, 10, 1), Read("a", 0, 15, 5)]
    assert store.find(_MANIFEST) == joined


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 10, b"[" * 100_000, b" " * (9 << 20)])
def test_a_damaged_profile_is_not_used_and_replaced(tmp_path: Path, damage: bytes) -> None:
    store = ProfileStore(str(tmp_path))
    store.add(_profile(Read("a", 0, 10, 5)))
    (path,) = (tmp_path / "profiles").iterdir()
    path.write_bytes(damage)
    assert store.find(_MANIFEST) is None
    store.add(_profile(Read("b", 0, 10, 5)))
    assert store.find(_MANIFEST) == _profile(Read("b", 0, 10, 5))


@pytest.mark.parametrize("manifest", ["", "sha256:../../../x", "sha256:" + "g" * 64, "x"])
def test_a_name_that_is_no_digest_leads_nowhere(tmp_path: Path, manifest: str) -> None:
    store = ProfileStore(str(tmp_path))
    assert store.find(manifest) is None
    with pytest.raises(FormatError):
        store.add(_profile(Read("a", 0, 10, 5), manifest=manifest))
    assert list((tmp_path / "profiles").iterdir()) == []


def test_readers_see_one_profile_or_the_other_while_threads_store_them(tmp_path: Path) -> None:
    store = ProfileStore(str(tmp_path))
    store.add(_profile(Read("a" * 5000, 0, 10, 5)))
    stop = threading.Event()

    def add() -> None:
        while not stop.is_set():
            store.add(_profile(*[Read(f"{n}" * 500, 0, 10, 5) for n in range(20)]))

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert all(store.find(_MANIFEST) is not None for _ in range(300))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(list((tmp_path / "profiles").iterdir())) == 1


def test_a_disk_that_refuses_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ProfileStore(str(tmp_path))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Internal, match="No space left"):
        store.add(_profile(Read("a", 0, 10, 5)))
    assert list((tmp_path / "profiles").iterdir()) == []
