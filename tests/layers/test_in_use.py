# SPDX-License-Identifier: Apache-2.0
"""Indexes and images of trees that slots need, or that somebody is about to need, are not evicted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lazysnap.cache import Cache
from lazysnap.cache.eviction import CacheLimits, Evictor
from lazysnap.errors import NotLazy
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.layers import builder
from lazysnap.layers.in_use import names_in_use
from lazysnap.layers.slots import Inherited, SlotRecord, remove_slot, write_slot
from lazysnap.layers.tree_images import tree_name
from lazysnap.layers.view import open_index
from lazysnap.paths import Root
from tests.support.indexes import toc_of
from tests.support.layers import Layer, estargz, file, symlink

_INHERITED = [Inherited(1, 0o755, 0, 0, 0, [])]


def _record(slot: int, index: str, inherited: list[Inherited]) -> SlotRecord:
    return SlotRecord(
        slot=slot,
        shard=0,
        layer_digest="",
        index=index,
        reference="",
        blob_size=0,
        inherited=inherited,
    )


def test_names_are_those_of_all_slots(tmp_path: Path) -> None:
    assert names_in_use(str(tmp_path)) == set()
    write_slot(str(tmp_path), _record(1, "a", []))
    write_slot(str(tmp_path), _record(2, "b", _INHERITED))
    names = names_in_use(str(tmp_path))
    assert names is not None
    assert {"a", tree_name("a"), "b", tree_name("b", _INHERITED)} <= names
    assert tree_name("a", _INHERITED) not in names
    remove_slot(str(tmp_path), 1)
    assert "a" not in (names_in_use(str(tmp_path)) or "a")


def test_nothing_is_known_if_a_slot_cannot_be_read(tmp_path: Path) -> None:
    write_slot(str(tmp_path), _record(1, "a", []))
    Path(Root(str(tmp_path)).slots, "2").write_bytes(b"of another release")
    assert names_in_use(str(tmp_path)) is None


def test_an_index_that_was_just_opened_is_not_evicted_before_its_slot_has_a_record(
    tmp_path: Path,
) -> None:
    """Whoever pulls an image again finds the index of the last time."""
    cache = Cache(Root(str(tmp_path)).cache.path)
    evictor = Evictor(
        cache,
        CacheLimits(1, reserve_bytes=0, reserve_percent=0),
        lambda: names_in_use(str(tmp_path)),
    )
    path = cache.paths.index("layer")
    old = time.time_ns() - 90 * 86400 * 10**9
    for opened in (True, False):
        Path(path).write_bytes(encode(build(toc_of(estargz([file("f", b"x")])))))
        os.utime(path, ns=(old, old))
        if opened:
            open_index(path)
        evictor.look()
        assert os.path.exists(path) == opened


def _job(layer: Layer, directory: Path) -> builder.Job:
    return builder.Job(
        path=str(directory / "index"),
        blob_size=layer.size,
        annotations=dict(layer.annotations),
        toc_digest=str(layer.toc_digest),
    )


def test_a_layer_that_is_nearly_all_index_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = estargz([symlink(f"directory/{n:06}", "target") for n in range(2000)])
    size = builder._build(_job(layer, tmp_path), layer.blob).node_count
    assert size > 2000
    os.unlink(tmp_path / "index")
    monkeypatch.setattr(builder, "_INDEX_LEAST", 1000)
    monkeypatch.setattr(builder, "_INDEX_SHARE", 1)
    with pytest.raises(NotLazy) as caught:
        builder._build(_job(layer, tmp_path), layer.blob)
    assert caught.value.reason == "too-costly"
    assert os.listdir(tmp_path) == []


def test_a_layer_of_many_empty_files_is_a_layer(tmp_path: Path) -> None:
    layer = estargz([file(f"directory/file-{n:06}") for n in range(2000)])
    builder._build(_job(layer, tmp_path), layer.blob)
    # So are 700,000 of them.
    assert os.path.getsize(tmp_path / "index") < builder._INDEX_LEAST // 350
