# SPDX-License-Identifier: Apache-2.0
"""Links are followed within a tree as the kernel follows them below the root of a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazysnap.layers.links import Link, Steps, TooManySteps, follow, follow_on


def _step(place: Path, name: bytes) -> Path | Link | None:
    below = place / os.fsdecode(name)
    if below.is_symlink():
        return Link(os.fsencode(os.readlink(below)))
    return below if below.exists() else None


def _follow(top: Path, path: bytes) -> Path | None:
    way = follow(path.split(b"/"), top, _step, Steps(1000))
    return None if way is None else way[-1]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    for name, target in {
        "relative": "a/b",
        "a/up": "../relative",
        "a/b/absolute": "/a/file",
        "a/b/beyond": "../../../../a",
        "dead": "a/nothing",
        "circle": "circle",
    }.items():
        (tmp_path / name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (b"", ""),
        (b"a//./b/", "a/b"),
        (b"relative", "a/b"),
        (b"relative/..", "a"),
        (b"a/up/../file", "a/file"),
        (b"a/up/absolute", "a/file"),
        (b"a/b/beyond/b", "a/b"),
        (b"../../a/..", ""),
    ],
)
def test_a_path_leads_where_the_kernel_goes(top: Path, path: bytes, place: str) -> None:
    assert _follow(top, path) == top / place


@pytest.mark.parametrize("path", [b"nothing", b"dead", b"circle", b"a/nothing/.."])
def test_a_path_that_leads_nowhere_is_none(top: Path, path: bytes) -> None:
    assert _follow(top, path) is None


def test_forty_links_are_followed_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for number in range(1, 42):
        (tmp_path / str(number)).symlink_to(str(number - 1))
    assert _follow(tmp_path, b"40") == tmp_path / "0"
    assert _follow(tmp_path, b"41") is None


def test_all_places_on_the_way_are_told(top: Path) -> None:
    assert follow([b"a", b"up"], top, _step, Steps(9)) == [top, top / "a", top / "a/b"]


def test_a_walk_goes_on_from_where_another_ended(top: Path) -> None:
    way = follow([b"a", b"b"], top, _step, Steps(9))
    assert way is not None
    assert follow_on(way, [b"absolute"], _step, Steps(9)) == [top, top / "a", top / "a/file"]
    assert follow_on(way, [b"..", b"up"], _step, Steps(9)) == [top, top / "a", top / "a/b"]


def test_a_search_ends_with_its_budget(tmp_path: Path) -> None:
    """Links are few, but each leads there and back again."""
    (tmp_path / "d").mkdir()
    (tmp_path / "L0").mkdir()
    for number in range(1, 31):
        (tmp_path / f"L{number}").symlink_to("d/../" * 700 + f"L{number - 1}")
    steps = Steps(60_000)
    assert follow([b"L30"], tmp_path, _step, steps) == [tmp_path, tmp_path / "L0"]
    assert steps.left < 20_000
    with pytest.raises(TooManySteps):
        follow([b"L30"], tmp_path, _step, steps)
