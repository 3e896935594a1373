# SPDX-License-Identifier: Apache-2.0
"""Images of trees: made when needed, never used when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazysnap.cache import Cache
from lazysnap.erofs.image import build as build_image
from lazysnap.errors import FormatError, Internal
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import Inherited
from lazysnap.layers.tree_images import ensure_tree, tree_name
from tests.support import layers
from tests.support.indexes import toc_of

ENTRIES = [layers.file("left/out/file", b"x"), layers.directory("listed")]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(str(tmp_path / "cache"))
    Path(cache.index, "i").write_bytes(encode(build(toc_of(layers.estargz(ENTRIES)))))
    return cache


def _index(cache: Cache) -> LayerIndex:
    return LayerIndex(Path(cache.index, "i").read_bytes())


def _left_out(cache: Cache, **fields: object) -> list[Inherited]:
    values = {"mode": 0o1711, "uid": 7, "gid": 70_000, "mtime_ns": -1, "xattrs": [], **fields}
    return [Inherited(node=node, **values) for node, _ in _index(cache).implied()]  # type: ignore[arg-type]


def test_it_is_made_once(cache: Cache) -> None:
    path = ensure_tree(cache, "i")
    made = os.stat(path).st_ino
    assert ensure_tree(cache, "i") == path
    assert os.stat(path).st_ino == made
    assert os.listdir(cache.trees) == [tree_name("i")]


@pytest.mark.parametrize("xattrs", [[], [(b"user.of", b"below")]])
def test_attributes_from_below_make_another_image(
    cache: Cache, xattrs: list[tuple[bytes, bytes]]
) -> None:
    base = ensure_tree(cache, "i")
    inherited = _left_out(cache, xattrs=xattrs)
    assert inherited
    path = ensure_tree(cache, "i", inherited)
    assert path != base
    image = Path(path).read_bytes()
    expected = build_image(_index(cache), inherited=inherited)
    assert image[: len(expected)] == expected
    assert ensure_tree(cache, "i", _left_out(cache, uid=8)) != path


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_what_is_damaged_is_made_anew(cache: Cache, damage: str) -> None:
    path = Path(ensure_tree(cache, "i"))
    whole = path.read_bytes()
    if damage == "cut":
        os.truncate(path, len(whole) - 1)
    elif damage == "emptied":
        os.truncate(path, 0)
    else:
        path.write_bytes(whole[:5000] + b"?" + whole[5001:])
    assert Path(ensure_tree(cache, "i")).read_bytes() == whole


def test_without_an_index_there_is_none(cache: Cache) -> None:
    with pytest.raises(Internal):
        ensure_tree(cache, "other")
    assert os.listdir(cache.trees) == []


def test_attributes_of_a_listed_directory_are_refused(cache: Cache) -> None:
    ensure_tree(cache, "i")
    listed = _index(cache).lookup(0, b"listed")
    wrong = [Inherited(node=listed, mode=0, uid=0, gid=0, mtime_ns=0, xattrs=[])]
    with pytest.raises(FormatError):
        ensure_tree(cache, "i", wrong)
