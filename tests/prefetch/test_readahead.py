# SPDX-License-Identifier: Apache-2.0
"""What is local of a start comes into the page cache, and only the rest is planned to be fetched."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
from pathlib import Path

import pytest

from lazysnap.cache import Cache
from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.members import of_file
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.tree_images import ensure_tree
from lazysnap.layers.view import open_index
from lazysnap.prefetch import readahead
from lazysnap.prefetch.profile import Read, locate
from lazysnap.prefetch.readahead import prepare_start, prepare_tree
from tests.support import layers
from tests.support.indexes import toc_of
from tests.support.stack import wait_until

_SIZE = 50_000
_DATA = {name: random.Random(name).randbytes(_SIZE) for name in ("a", "b", "c")}
_READS = [Read(name, 0, 1 << 40, 10 - n) for n, name in enumerate("abc")]


class _Start:
    """A layer of which the cache has `a` and `b`, but not in memory."""

    def __init__(self, root: Path) -> None:
        self.cache = Cache(str(root))
        layer = layers.estargz([layers.file(name, data) for name, data in _DATA.items()])
        Path(self.cache.index, "i").write_bytes(encode(build(toc_of(layer))))
        record = SlotRecord(
            slot=1, shard=0, layer_digest=layer.digest, index="i", reference="r", blob_size=1
        )
        self.record = record
        self.index = open_index(os.path.join(self.cache.index, "i"))
        self.tree = ensure_tree(self.cache, "i")
        keys = {name: hashlib.sha256(data).digest() for name, data in _DATA.items()}
        for name in ("a", "b"):
            self.cache.objects.put(keys[name], _DATA[name])
        self.objects = {name: self.cache.objects.path(key) for name, key in keys.items()}
        for path in (self.tree, self.objects["a"], self.objects["b"]):
            _drop(path)

    def plan(self, reads: list[Read]) -> Plan:
        return prepare_start(self.cache, self.index, locate(self.index, reads))

    def members(self, *names: str) -> list[int]:
        found = locate(self.index, [read for read in _READS if read.path in names])
        return sorted({member for node, _ in found for member in of_file(self.index, node)})


def _drop(path: str) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _in_memory(path):
        pytest.skip("this file system keeps files in memory")


def _in_memory(path: str) -> bool:
    """Whether all of a file is in the page cache; reads nothing, unlike `preadv` with RWF_NOWAIT."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped,
    ):
        first = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        size = ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), size, pages)
        del first  # or the map could not be closed
        assert not failed
        return all(page & 1 for page in pages)


@pytest.fixture
def start(tmp_path: Path) -> _Start:
    return _Start(tmp_path)


def test_what_is_local_is_read_and_the_rest_planned(start: _Start) -> None:
    plan = start.plan([*_READS, Read("none", 0, 9, 0)])
    assert sorted(plan.members) == start.members("c")
    for path in (start.objects["a"], start.objects["b"]):
        wait_until(lambda path=path: _in_memory(path))


def test_the_image_of_a_tree_is_read_if_there_is_one(start: _Start) -> None:
    prepare_tree(start.cache, start.record)
    wait_until(lambda: _in_memory(start.tree))
    os.unlink(start.tree)
    prepare_tree(start.cache, start.record)


def test_no_more_is_read_than_the_limit(start: _Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """`b` comes before `a` in the order of need; there is room for one of them."""
    monkeypatch.setattr(readahead, "_MOST", _SIZE + 1)
    plan = start.plan(_READS)
    assert set(start.members("a", "c")) <= set(plan.members)
    wait_until(lambda: _in_memory(start.objects["b"]))
    assert not _in_memory(start.objects["a"])


def test_what_the_cache_is_not_sure_of_is_planned(start: _Start) -> None:
    start.cache.objects.distrust(hashlib.sha256(_DATA["a"]).digest())
    plan = start.plan(_READS)
    assert set(start.members("a", "c")) <= set(plan.members)
