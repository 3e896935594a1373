# SPDX-License-Identifier: Apache-2.0
"""Changes of objects are noticed when they happen; our own work on them is no change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap.cache import Cache
from lazysnap.cache.watch import ObjectWatch

DATA = b"right"
KEY = hashlib.sha256(DATA).digest()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


@pytest.fixture
def watch(cache: Cache) -> Iterator[ObjectWatch]:
    watch = ObjectWatch(cache.objects.root)
    yield watch
    watch.close()


def test_storing_and_removing_are_no_changes(cache: Cache, watch: ObjectWatch) -> None:
    cache.objects.put(KEY, DATA)
    cache.objects.seal()
    fd = cache.objects.open(KEY, len(DATA))
    assert fd is not None
    os.close(fd)
    cache.objects.demote(KEY)
    assert cache.objects.verify(KEY)
    cache.objects.seal()
    cache.objects.remove(KEY)
    assert watch.changed() == set()


def test_a_write_is_a_change(cache: Cache, watch: ObjectWatch) -> None:
    cache.objects.put(KEY, DATA)
    cache.objects.seal()
    path = Path(cache.objects.path(KEY))
    with path.open("r+b") as file:
        file.write(b"w")
    assert watch.changed() == {KEY}
    assert watch.changed() == set()
    path.with_name("other").write_bytes(b"not an object")
    assert watch.changed() == set()
