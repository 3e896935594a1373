# SPDX-License-Identifier: Apache-2.0
"""What becomes of objects that somebody changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import trio

from lazysnap.cache import Cache
from lazysnap.cache.watch import ObjectWatch
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.shard.cache_upkeep import CacheUpkeep

_EVENTS = Path("/proc/sys/fs/inotify/max_queued_events")


async def test_changes_that_the_kernel_could_not_tell_are_found(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    contents = OpenFiles(cache)
    keys = []
    for number in range(4):
        data = b"%d" % number * 1000
        keys.append(hashlib.sha256(data).digest())
        cache.objects.put(keys[-1], data)
        if number == 1:
            cache.objects.seal()  # the first two
    paths = [Path(cache.objects.root) / cache.objects.name(key) for key in keys]
    watch = ObjectWatch(cache.objects.root)
    # More than it remembers; equal ones that follow each other are one.
    for number in range(int(_EVENTS.read_text()) // 2 + 1):
        with paths[number % 2].open("r+b") as file:
            file.write(b"x")
    for path in paths[1:3]:
        path.write_bytes(b"y" * 1000)
    upkeep = CacheUpkeep(contents, 0.05, watch, lambda: None, lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.run)
        with trio.fail_after(60):
            while any(path.exists() for path in paths[:3]):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    opened = [cache.objects.open(key, 1000) for key in keys[:3]]
    assert opened == [None, None, None]
    assert [cache.objects.verify(key) for key in keys] == [False, False, False, True]
    contents.close()
