# SPDX-License-Identifier: Apache-2.0
"""Paths in the tree of an image."""

from __future__ import annotations

from lazysnap.prefetch.overlay_lookup import find_file, names
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


def _find(path: str) -> tuple[int, str] | None:
    found = find_file(_LAYERS, path.encode())
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
    assert names(_LAYERS, b"/lib") == {b"a", b"b", b"x"}
    assert names(_LAYERS, b"/hidden") == set()
    assert names(_LAYERS, b"/nothing") == set()
