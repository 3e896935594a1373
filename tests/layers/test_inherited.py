# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lazysnap.errors import NotLazy
from lazysnap.layers import inherited
from lazysnap.layers.inherited import DirectoryTree, LowerTree, ViewTree, hides_something, inherit
from lazysnap.layers.slots import Inherited, SlotRecord
from lazysnap.layers.view import LayerView
from tests.support import layers
from tests.support.indexes import index_of, resolve
from tests.support.layers import LayerEntry

Make = Callable[[Sequence[LayerEntry]], LowerTree]
_S = 10**9


@pytest.fixture(params=["lazy", "unpacked"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes a lower layer: mounted lazily, or unpacked by GNU tar as overlay has it."""

    def lazy(entries: Sequence[LayerEntry]) -> LowerTree:
        record = SlotRecord(slot=1, shard=0, layer_digest="", index="", reference="", blob_size=0)
        return ViewTree(LayerView(record, index_of(layers.estargz(entries))))

    def unpacked(entries: Sequence[LayerEntry]) -> LowerTree:
        target = tmp_path / f"lower{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        plain = [e for e in entries if "/.wh." not in "/" + e.path]
        command = ["tar", "-x", "-p", "--xattrs", "--xattrs-include=*", "-C", str(target)]
        subprocess.run(command, input=layers.make_tar(plain), check=True)
        for entry in entries:
            head, marker, base = entry.path.rpartition(".wh.")
            if marker:
                os.mknod(target / head / base, 0o020000, 0)
        return DirectoryTree(str(target))

    return lazy if request.param == "lazy" else unpacked


def _inherit(path: str, *lowers: LowerTree) -> dict[str, Inherited]:
    """What the left-out directories above `path` take over, by their paths."""
    index = index_of(layers.estargz([layers.file(path, b"x")]))
    parts = path.split("/")[:-1]
    places = {
        resolve(index, "/".join(parts[: n + 1])): "/".join(parts[: n + 1])
        for n in range(len(parts))
    }
    return {places[found.node]: found for found in inherit(index, lowers)}


def _facts(found: Inherited) -> tuple[int, int, int, int]:
    return found.mode, found.uid, found.gid, found.mtime_ns


pytestmark = pytest.mark.root


def test_attributes_of_the_nearest_layer_that_has_it(make: Make) -> None:
    near = make(
        [
            layers.directory(
                "a",
                mode=0o1777,
                uid=1,
                gid=2,
                mtime_ns=5 * _S,
                xattrs={"user.a": b"1", "trusted.b": b"2"},
            ),
        ]
    )
    far = make(
        [
            layers.directory("a", mode=0o700, mtime_ns=6 * _S),
            layers.directory("a/b", mode=0o2750, uid=3, gid=4, mtime_ns=7 * _S),
        ]
    )
    found = _inherit("a/b/c/file", near, far)
    assert _facts(found["a"]) == (0o1777, 1, 2, 5 * _S)
    assert found["a"].xattrs == [(b"user.a", b"1")]
    assert _facts(found["a/b"]) == (0o2750, 3, 4, 7 * _S)
    assert "a/b/c" not in found


@pytest.mark.parametrize("between", [layers.whiteout("a"), layers.file("a", b"f")])
def test_what_is_no_directory_ends_the_search(make: Make, between: LayerEntry) -> None:
    far = make([layers.directory("a", mode=0o700)])
    assert _inherit("a/file", make([between]), far) == {}


@pytest.mark.parametrize(
    "link",
    [
        [layers.symlink("a", "real")],
        [layers.symlink("a", "/real")],
        [layers.symlink("a", "../../../real")],
        [layers.symlink("a", "./x/../real/.")],
        [layers.symlink("a", "x/up"), layers.symlink("x/up", "../real")],
        [layers.symlink("a", "x/abs"), layers.symlink("x/abs", "/x/../real")],
    ],
)
def test_links_are_followed_within_the_layer(make: Make, link: list[LayerEntry]) -> None:
    lower = make(
        [
            layers.directory("x"),
            layers.directory("real", mode=0o711, uid=8),
            layers.directory("real/b", mode=0o722, uid=9),
            *link,
        ]
    )
    found = _inherit("a/b/file", lower)
    assert (found["a"].mode, found["a"].uid) == (0o711, 8)
    assert (found["a/b"].mode, found["a/b"].uid) == (0o722, 9)


@pytest.mark.parametrize("target", ["a", "b", "nowhere", "../a", "b/../b"])
def test_links_to_nowhere_and_in_circles(make: Make, target: str) -> None:
    near = make([layers.symlink("a", target), layers.symlink("b", "a")])
    far = make([layers.directory("a", mode=0o700)])
    # The link leads to nothing, so the next layer is asked.
    assert [found.mode for found in _inherit("a/file", near, far).values()] == [0o700]


def test_a_layer_that_lists_its_directories_inherits_nothing(make: Make) -> None:
    lower = make([layers.directory("a", mode=0o700)])
    index = index_of(layers.estargz([layers.directory("a"), layers.file("a/f")]))
    assert inherit(index, [lower]) == []


def test_a_mark_of_a_directory_that_is_new_hides_nothing(make: Make) -> None:
    upper = index_of(layers.estargz([layers.opaque("new/sub"), layers.opaque("old/sub")]))
    assert not hides_something(upper, [])
    assert not hides_something(upper, [make([layers.directory("old"), layers.file("old/sub")])])
    assert not hides_something(upper, [make([layers.directory("new")]), make([])])
    assert hides_something(upper, [make([]), make([layers.directory("old/sub")])])


@pytest.mark.parametrize("links", [True, False])
def test_a_layer_cannot_have_us_search_without_end(
    make: Make, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """By few links that are long, or by many directories."""
    if links:
        chain = [layers.symlink(f"L{n}", "d/../" * 700 + f"L{n + 1}") for n in range(30)]
        lower = make([layers.directory("d"), *chain, layers.directory("L30")])
        path = "L0/f"
        monkeypatch.setattr(inherited, "_STEPS_MOST", 50_000)
    else:
        lower = make([layers.directory("d")])
        path = "/".join(["d"] * 300)
        monkeypatch.setattr(inherited, "_STEPS_MOST", 500)
    with pytest.raises(NotLazy) as caught:
        _inherit(path, lower)
    assert caught.value.reason == "too-costly"
