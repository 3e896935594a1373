# SPDX-License-Identifier: Apache-2.0
"""Paths in the tree of an image."""

from __future__ import annotations

import pytest

from lazysnap.layers.links import Steps, TooManySteps
from lazysnap.prefetch.overlay_lookup import OverlayTree
from tests.support.indexes import index_of
from tests.support.layers import directory, estargz, file, opaque, symlink, whiteout

_LOW = index_of(
    estargz(
        [
            symlink("lib", "usr/lib"),
            file("usr/lib/a", b"low a"),
            file("usr/lib/b", b"low b"),
            file("usr/lib/x/c", b"low c"),
            file("hidden/d", b"low d"),
            symlink("up", "usr/lib/../../usr/lib/a"),
            symlink("loop", "loop"),
            symlink("away", "/nowhere/at/all"),
        ]
    )
)
_HIGH = index_of(
    estargz(
        [
            file("usr/lib/a", b"high a"),
            whiteout("usr/lib/b"),
            directory("usr/lib/x"),
            directory("hidden"),
            opaque("hidden"),
            symlink("etc/alternative", "/lib/a"),
            symlink("etc/relative", "../lib/x/c"),
        ]
    )
)
_LAYERS = [_HIGH, _LOW]
_TREE = OverlayTree(_LAYERS)


def _find(path: str) -> tuple[int, str] | None:
    found = _TREE.find_file(path.encode(), Steps(1000))
    assert _TREE.find_file(path.encode(), Steps(0)) == found  # it is remembered
    if found is None:
        return None
    assert _LAYERS[found.layer].path(found.node) == found.path
    return found.layer, found.path.decode()


def test_the_uppermost_file_is_found() -> None:
    assert _find("/usr/lib/a") == (0, "/usr/lib/a")
    assert _find("usr//lib/./x/c") == (1, "/usr/lib/x/c")


def test_links_are_followed_over_layers() -> None:
    assert _find("/lib/a") == (0, "/usr/lib/a")
    assert _find("/etc/alternative") == (0, "/usr/lib/a")
    assert _find("/etc/relative") == (1, "/usr/lib/x/c")
    assert _find("/up") == (0, "/usr/lib/a")
    assert _find("/../../lib/x/../a") == (0, "/usr/lib/a")


def test_what_is_deleted_or_hidden_is_not_found() -> None:
    assert _find("/usr/lib/b") is None
    assert _find("/hidden/d") is None


def test_what_is_no_file_is_not_found() -> None:
    for path in ("", "/", "/usr/lib", "/nothing", "/usr/lib/a/b", "/loop", "/away", "/lib"):
        assert _find(path) is None


def test_names_of_a_directory_are_those_of_all_its_layers() -> None:
    assert _TREE.names(b"/lib", Steps(1000)) == {b"a", b"b", b"x"}
    assert _TREE.names(b"/hidden", Steps(1000)) == set()
    assert _TREE.names(b"/nothing", Steps(1000)) == set()


def test_a_look_into_each_layer_is_a_step() -> None:
    """Of an image of many layers each name of a path can take as many looks."""
    layers = [index_of(estargz([directory("a"), directory("b")]))] * 100
    tree = OverlayTree([*layers, index_of(estargz([file("a/f", b"x")]))])
    steps = Steps(1000)
    assert tree.find_file(b"/a/f", steps) is not None
    assert 202 <= 1000 - steps.left <= 210
    steps = Steps(300)
    with pytest.raises(TooManySteps):
        tree.find_file(b"/b/../b/../b/f", steps)


def test_a_directory_is_searched_for_once() -> None:
    tree = OverlayTree(_LAYERS)
    tree.find_file(b"/usr/lib/x/one", Steps(1000))
    steps = Steps(10)
    for number in range(3):
        assert tree.find_file(b"/usr/lib/x/%d" % number, steps) is None
    assert steps.left == 1
