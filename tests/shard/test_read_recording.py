# SPDX-License-Identifier: Apache-2.0
"""What is noted while a start is watched, and what the kernel gets to see of it."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.shard.scene import Shard, shard
from tests.support import layers
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse]

_SMALL = {f"d/{number:04}": 500 + number for number in range(1500)}
_LARGE = {"large/0": (128 << 10) + 1, "large/1": 300_000}


def _layer() -> tuple[layers.Layer, dict[str, bytes]]:
    source = random.Random(1)
    files = {name: source.randbytes(size) for name, size in (_SMALL | _LARGE).items()}
    return layers.estargz([layers.file(name, data) for name, data in files.items()]), files


def _stored(directory: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(directory))


def _recorded(it: Shard, since: float) -> list[list[Any]]:
    (reads,) = it.call("recorded", slots=[1], since=since).values()
    return list(reads)


@pytest.mark.parametrize("fresh", [False, True])
def test_who_walks_through_a_layer_is_not_watched_unless_that_is_wanted(
    tmp_path: Path, fresh: bool
) -> None:
    # Never settles by itself within the test.
    with shard(tmp_path, seal_seconds=3600.0) as it:
        layer, files = _layer()
        tree = it.attach(layer)
        since = time.monotonic()
        it.call("record", slots=[1], since=since, fresh=fresh)
        for name in ["d/0000", "d/1000", *_LARGE]:
            (tree / name).read_bytes()
        objects, aside = it.root / "cache" / "objects", it.root / "cache" / "aside"
        if fresh:
            wait_until(lambda: _stored(aside) >= 4)
            assert _stored(objects) == 0
        else:
            wait_until(lambda: _stored(aside) == len(_LARGE) and _stored(objects) >= 2)
        for name in _SMALL:
            (tree / name).read_bytes()
        if fresh:
            assert _stored(objects) == 0
        else:
            wait_until(lambda: _stored(objects) == len(files))
        assert {name for name, *_ in _recorded(it, since)} >= set(list(_SMALL)[:1000])
        wait_until(lambda: _stored(objects) == len(files))


def test_what_the_kernel_opens_is_noted_if_it_is_small(tmp_path: Path) -> None:
    with shard(tmp_path, seal_seconds=3600.0) as it:
        layer, files = _layer()
        tree = it.attach(layer)
        for name in files:
            (tree / name).read_bytes()
        # What an image reads that shares the layer.
        opened = [*list(_SMALL)[5:905:3], *_LARGE]
        objects = it.root / "cache" / "objects"
        wait_until(lambda: _stored(objects) == len(files))

        def open_them() -> None:
            for name in opened:
                digest = hashlib.sha256(files[name]).hexdigest()
                (objects / digest[:2] / digest).read_bytes()

        open_them()
        first = time.monotonic()
        it.call("record", slots=[1], since=first)
        open_them()
        second = time.monotonic()
        it.call("record", slots=[1], since=second)
        (tree / "large/1").read_bytes()
        open_them()
        expected = {name: _SMALL[name] for name in opened if name in _SMALL}
        for since in (first, second):
            reads = {name: (offset, size) for name, offset, size, _ in _recorded(it, since)}
            reads.pop("large/1", None)
            assert reads == {name: (0, size) for name, size in expected.items()}
        # Nobody watches any more.
        open_them()
        since = time.monotonic()
        it.call("record", slots=[1], since=since)
        assert _recorded(it, since) == []
