# SPDX-License-Identifier: Apache-2.0
"""Where layers are put; starting and repairing shards is tested with the daemon."""

from __future__ import annotations

from pathlib import Path

from lazysnap.shard.settings import FIRST_XATTR_SHARD
from lazysnap.supervisor import Supervisor


def test_layers_are_spread_over_the_shards(tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path), 2)
    placed = []
    for layer in ("a", "b", "c", "d"):
        shard = supervisor.choose(layer, xattrs=False)
        supervisor.note(shard, layer)
        placed.append(shard)
    assert sorted(placed) == [0, 0, 1, 1]


def test_slots_of_one_layer_stay_together_as_long_as_one_is_left(tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path), 2)
    for layer in ("a", "b", "b"):
        supervisor.note(supervisor.choose(layer, xattrs=False), layer)
    (home,) = {supervisor.choose("b", xattrs=False)}
    supervisor.note_gone(home, "b")
    for other in ("c", "d", "e"):
        supervisor.note(home, other)
    assert supervisor.choose("b", xattrs=False) == home
    supervisor.note_gone(home, "b")
    assert supervisor.choose("b", xattrs=False) != home


def test_layers_with_xattrs_have_shards_of_their_own(tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path), 2)
    supervisor.note(0, "a")
    assert supervisor.choose("a", xattrs=True) == FIRST_XATTR_SHARD


def test_a_layer_that_is_expected_comes_where_it_was_told_of(tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path), 2)
    with supervisor.reserved("a") as first, supervisor.reserved("b") as second:
        assert {first, second} == {0, 1}
        for _ in range(3):
            supervisor.note(second, "others")
        assert supervisor.choose("b", xattrs=False) == second
        assert supervisor.choose("b", xattrs=True) == FIRST_XATTR_SHARD
        assert supervisor.layers() == 3
    assert supervisor.choose("b", xattrs=False) == first
