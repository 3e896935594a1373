# SPDX-License-Identifier: Apache-2.0
"""What is said of the stores in storage.conf."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lazysnap.check.finding import Finding, Level
from lazysnap.check.podman import stores
from tests.check.scene import context


def _found(tmp_path: Path, text: str) -> list[Finding]:
    directory = tmp_path / "system" / "etc" / "containers"
    directory.mkdir(parents=True)
    (directory / "storage.conf").write_text(text)
    return list(stores(context(tmp_path, system=str(tmp_path / "system"))))


def _entry(directory: Path, option: str = ":ref") -> str:
    return f'[storage.options]\nadditionallayerstores = ["{directory}{option}"]\n'


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").symlink_to(tmp_path / "shards" / "0" / "layers")
    return tmp_path / "store"


def test_without_a_store_nothing_is_said(tmp_path: Path) -> None:
    assert list(stores(context(tmp_path, system=str(tmp_path)))) == []
    (tmp_path / "other").mkdir()
    assert _found(tmp_path, _entry(tmp_path / "other", "")) == []


def test_a_store_that_answers(tmp_path: Path, store: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "store.sock"))
        listener.listen()
        assert _found(tmp_path, _entry(store)) == []


def test_a_store_that_nobody_serves(tmp_path: Path, store: Path) -> None:
    (found,) = _found(tmp_path, _entry(store))
    assert (found.level, "does not answer" in found.summary) == (Level.WARNING, True)


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    (found,) = _found(tmp_path, _entry(tmp_path / "gone"))
    assert (found.level, "is not there" in found.summary) == (Level.FAILURE, True)


def test_a_store_without_references(tmp_path: Path, store: Path) -> None:
    found, _ = _found(tmp_path, _entry(store, ""))
    assert (found.level, "without :ref" in found.summary) == (Level.FAILURE, True)


@pytest.mark.parametrize("text", ["a = ", "[storage]\noptions = 1", "storage = []"])
def test_a_file_that_is_wrong(tmp_path: Path, text: str) -> None:
    assert len(_found(tmp_path, text)) == (text == "a = ")
