# SPDX-License-Identifier: Apache-2.0
"""When the kernel gets to see what is fetched while a start is watched."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.shard.bench import shard
from tests.support import layers
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse]

_FILES = [f"d/{number:04}" for number in range(1500)]


def _layer() -> layers.Layer:
    source = random.Random(1)
    return layers.estargz(
        [layers.file(name, source.randbytes(500 + number)) for number, name in enumerate(_FILES)]
    )


def _stored(directory: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(directory))


@pytest.mark.parametrize("fresh", [False, True])
def test_who_walks_through_a_layer_is_not_watched_unless_that_is_wanted(
    tmp_path: Path, fresh: bool
) -> None:
    # Never settles by itself within the test.
    with shard(tmp_path, seal_seconds=3600.0) as it:
        tree = it.attach(_layer())
        since = time.monotonic()
        it.call("record", slots=[1], since=since, fresh=fresh)
        for name in _FILES[::500]:
            (tree / name).read_bytes()
        objects, aside = it.root / "cache" / "objects", it.root / "cache" / "aside"
        wait_until(lambda: _stored(aside) >= 3)
        assert _stored(objects) == 0
        for name in _FILES:
            (tree / name).read_bytes()
        if fresh:
            assert _stored(objects) == 0
        else:
            wait_until(lambda: _stored(objects) == len(_FILES))
        found = it.call("recorded", slots=[1], since=since)
        (reads,) = found.values()
        assert {read[0] for read in reads} >= set(_FILES[:1000])
        wait_until(lambda: _stored(objects) == len(_FILES))
