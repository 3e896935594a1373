# SPDX-License-Identifier: Apache-2.0
"""The layout of the disk is what releases before this one wrote, and what the next one will read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lazysnap import paths
from lazysnap.paths import CacheDirectory, Root
from lazysnap.shard import content_view, keeper, store_view

ROOT = Root("/r")

LAYOUT = {
    "metadata.db": ROOT.database,
    "lock": ROOT.lock,
    "daemon.json": ROOT.daemon_facts,
    "daemon.sock": ROOT.daemon_socket,
    "snapshots": ROOT.snapshots,
    "snapshots/7": ROOT.snapshot(7),
    "merged": ROOT.merged,
    "merged/7": ROOT.merged_slot(7),
    "shards": ROOT.shards,
    "shards/3": ROOT.shard(3),
    "shards/3/7": ROOT.shard_slot(3, 7),
    "shards/3/contents/7": ROOT.shard_contents(3, 7),
    "shards/3.sock": ROOT.shard_socket(3),
    "shards/3.lock": ROOT.shard_lock(3),
    "shards/3.log": ROOT.shard_log(3),
    "shards/settings": ROOT.shard_settings,
    "shards/xattrs": ROOT.shard_xattrs,
    "slots": ROOT.slots,
    "slots/7": ROOT.slot(7),
    "cache": ROOT.cache.path,
    "cache/index": ROOT.cache.indexes,
    "cache/index/abc": ROOT.cache.index("abc"),
    "cache/index/abc.tail": ROOT.cache.tail("abc"),
    "cache/trees": ROOT.cache.trees,
    "cache/objects": ROOT.cache.objects,
    "cache/aside": ROOT.cache.aside,
    "cache/partial": ROOT.cache.partial,
    "cache/boot": ROOT.cache.boot,
    "cache/usage": ROOT.cache.usage,
    "cache/evicted": ROOT.cache.evicted,
    "profiles": ROOT.profiles,
    "profiles/abc.json": ROOT.profile("abc"),
    "store.sock": ROOT.store_socket,
    "store": ROOT.store,
    "shards/0/layers": ROOT.store_layers,
    "names": ROOT.names,
    "storages": ROOT.storages,
    "trees": ROOT.nested,
    "trees/7": ROOT.nested_slot(7),
    "standalone": ROOT.standalone_mark,
    "empty": ROOT.empty,
}


def test_each_path_is_where_it_always_was() -> None:
    assert list(LAYOUT.values()) == [f"/r/{name}" for name in LAYOUT]


@pytest.mark.parametrize("layout", [Root, CacheDirectory])
def test_no_path_is_left_out_above(layout: type[object]) -> None:
    pinned = Path(__file__).read_text(encoding="utf-8").partition("\n}\n")[0]
    names = {name for name in vars(layout) if not name.startswith("_")} - {"path", "shard_numbers"}
    assert {name for name in names if f".{name}" not in pinned} == set()


def test_defaults_are_what_they_always_were() -> None:
    assert paths.DEFAULT_ROOT == "/var/lib/lazysnap"
    assert paths.DEFAULT_STANDALONE_ROOT == "/var/lib/lazysnap-standalone"
    assert paths.DEFAULT_STORE_ROOT == "/var/lib/lazysnap-store"
    assert paths.DEFAULT_ADDRESS == "/run/lazysnap/lazysnap.sock"
    assert paths.CONTAINERD_ADDRESS == "/run/containerd/containerd.sock"


def test_the_keeper_uses_the_same_paths() -> None:
    assert keeper._paths("/r", 3) == (ROOT.shard(3), ROOT.shard_lock(3), ROOT.shard_log(3))


def test_views_of_a_shard_have_the_names_that_paths_lead_to() -> None:
    assert ROOT.shard_contents(3, 7) == f"/r/shards/3/{content_view.NAME.decode()}/7"
    assert ROOT.store_layers == f"/r/shards/0/{store_view.NAME.decode()}"


def test_shards_are_those_with_a_lock_file(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert root.shard_numbers() == []
    (tmp_path / "shards").mkdir()
    for name in ("0", "0.lock", "0.sock", "64.lock", "7.sock", "8.log", "x.lock", "settings"):
        (tmp_path / "shards" / name).touch()
    assert sorted(root.shard_numbers()) == [0, 64]


def test_processes_that_start_fast_can_afford_it() -> None:
    program = (
        "import sys; import lazysnap.paths; print([n for n in sys.modules if 'lazysnap' in n])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.decode().strip() == "['lazysnap', 'lazysnap.paths']"
