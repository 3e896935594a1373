# SPDX-License-Identifier: Apache-2.0
"""Files of a shard by what they contain, as overlay looks for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shard.scene import NUMBER, Shard, shard
from tests.support import layers

pytestmark = [pytest.mark.root, pytest.mark.fuse]

_LOW, _HIGH, _BOTH, _BIG = b"low", b"high", b"in both layers", os.urandom(250_000)
CHUNK = 100_000


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    with shard(tmp_path_factory.mktemp("contents")) as it:
        yield it


@pytest.fixture(scope="module")
def view(it: Shard) -> Path:
    """Of the upper one of two layers."""
    it.attach(layers.estargz([layers.file("a", _LOW), layers.file("b", _BOTH)]))
    entries = [layers.file("c", _HIGH), layers.file("d", _BOTH), layers.file("e", _BIG)]
    it.attach(layers.estargz(entries, chunk_size=CHUNK), below=[1])
    return it.mountpoint / "contents" / "2"


def _path(view: Path, data: bytes) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    return view / digest[:2] / digest


def test_contents_of_all_layers_are_found_by_digest(view: Path) -> None:
    for data in (_LOW, _HIGH, _BOTH, _BIG):
        assert _path(view, data).read_bytes() == data


def test_a_layer_alone_shows_only_its_own(it: Shard, view: Path) -> None:
    alone = it.mountpoint / "contents" / "1"
    assert _path(alone, _LOW).read_bytes() == _LOW
    assert not _path(alone, _HIGH).exists()


def test_it_is_the_same_file_as_in_the_tree(it: Shard, view: Path) -> None:
    assert _path(view, _BIG).stat().st_ino == (it.mountpoint / "2" / "e").stat().st_ino


@pytest.mark.parametrize(
    "name",
    [
        "00",
        "zz/" + "0" * 64,
        "00/" + "0" * 64,
        "00/" + "0" * 63,
        "00/p-" + "0" * 64,
        "00/" + "G" * 64,
        hashlib.sha256(_LOW).hexdigest()[:2] + "/" + hashlib.sha256(_LOW).hexdigest().upper(),
        hashlib.sha256(_LOW).hexdigest()[:2] + "/p-" + hashlib.sha256(_LOW).hexdigest(),
        "ff/" + hashlib.sha256(_LOW).hexdigest(),
    ],
)
def test_other_names_are_not_there(view: Path, name: str) -> None:
    assert not (view / name).is_file()


@pytest.mark.parametrize("slot", ["0", "01", "x", "99", str(2**30)])
def test_what_is_no_slot_is_not_there(it: Shard, view: Path, slot: str) -> None:
    assert not (it.mountpoint / "contents" / slot).exists()


def test_layers_of_another_shard_are_not_shown(it: Shard, view: Path) -> None:
    foreign = layers.estargz([layers.file("f", b"elsewhere")])
    it.attach(foreign, shard=NUMBER + 1, below=[1])
    (slot,) = it.mountpoint.parent.parent.glob("slots/3")
    elsewhere = it.mountpoint / "contents" / slot.name
    assert _path(elsewhere, _LOW).read_bytes() == _LOW
    assert not _path(elsewhere, b"elsewhere").exists()


def test_directories_list_nothing(view: Path) -> None:
    assert os.listdir(view) == []
    assert os.listdir(view / "00") == []
