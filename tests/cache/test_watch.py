# SPDX-License-Identifier: Apache-2.0
"""Changes of objects are noticed when they happen; our own work on them is no change."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap.cache import Cache
from lazysnap.cache.watch import ObjectWatch
from lazysnap.errors import Internal

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
    cache.objects.distrust(KEY)
    assert cache.objects.verify(KEY)
    cache.objects.seal()
    cache.objects.remove(KEY)
    assert watch.take() == (set(), [])


def test_a_write_is_a_change(cache: Cache, watch: ObjectWatch) -> None:
    cache.objects.put(KEY, DATA)
    cache.objects.seal()
    path = Path(cache.objects.path(KEY))
    with path.open("r+b") as file:
        file.write(b"w")
    assert watch.take() == ({KEY}, [])
    assert watch.take() == (set(), [])
    path.with_name("other").write_bytes(b"not an object")
    assert watch.take() == (set(), [])


def test_opening_is_told_while_that_is_wanted(cache: Cache, watch: ObjectWatch) -> None:
    cache.objects.put(KEY, DATA)
    path = Path(cache.objects.path(KEY))
    path.read_bytes()
    watch.tell_opens(True)
    assert watch.take() == (set(), [])
    path.read_bytes()
    path.stat()
    assert watch.take() == (set(), [KEY])
    with path.open("r+b") as file:
        file.write(b"w")
    assert watch.take() == ({KEY}, [KEY])
    watch.tell_opens(False)
    path.read_bytes()
    assert watch.take() == (set(), [])


def test_our_own_work_is_no_opening(cache: Cache, watch: ObjectWatch, tmp_path: Path) -> None:
    watch.tell_opens(True)
    cache.objects.put(KEY, DATA)
    complete = tmp_path / "complete"
    complete.write_bytes(DATA)
    assert cache.objects.adopt(str(complete), KEY)
    assert cache.objects.seal() == 1
    assert cache.objects.exists(KEY, len(DATA))
    cache.objects.distrust(KEY)
    assert watch.take() == (set(), [])


def test_what_cannot_be_watched_is_an_error(cache: Cache, watch: ObjectWatch) -> None:
    shutil.rmtree(cache.objects.root)
    with pytest.raises(Internal):
        watch.tell_opens(True)
