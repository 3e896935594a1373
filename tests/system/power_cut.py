# SPDX-License-Identifier: Apache-2.0
"""What `test_power_cut` runs: a process that stores for ever, and one that looks what is left.

    python -m tests.system.power_cut store CACHE SEED
    python -m tests.system.power_cut look CACHE SEED

`store` prints `sealed NUMBERS` for contents that have just been sealed, and `evicting` before it removes
some; it goes on until it is killed. `look` reads `[LAST NUMBER, [SEALED NUMBERS]]` and prints `{"opened",
"chunks", "lost", "wrong"}` for a cache that may have lost power at any moment: how many objects opened
without being read, how many chunks of partial files were used, which sealed contents are gone, and what
has wrong bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sys

from lazysnap.cache import Cache, PartialFile
from lazysnap.cache.eviction import CacheLimits, Evictor
from lazysnap.cache.inventory import Kind, entries

CHUNK = 40_000
_ROUND = 12
_LIMIT = 12 << 20
_EVICT_EVERY = 15


def content(seed: int, number: int) -> bytes:
    rng = random.Random(seed * 1_000_003 + number)  # data, not a secret
    return rng.randbytes(rng.choice([1, 100, 4096, 30_000, 100_000, 250_000]))


def _chunks(data: bytes) -> list[tuple[int, bytes]]:
    return [(at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


def _key(data: bytes) -> bytes:
    return hashlib.sha256(b"chunks of " + data).digest()


def _base(cache: Cache, data: bytes) -> str:
    return os.path.join(cache.partial, _key(data).hex())


def _partial(cache: Cache, data: bytes) -> PartialFile:
    return PartialFile(cache.partial, _key(data), len(data), len(_chunks(data)))


def _store_one(cache: Cache, data: bytes, number: int) -> bool:
    """Store a content as an object, by way of a partial file, or as a part of one."""
    key = hashlib.sha256(data).digest()
    if number % 3:
        cache.objects.put(key, data)
        return True
    file = _partial(cache, data)
    for place, (offset, chunk) in enumerate(_chunks(data)):
        if number % 2 or place % 2:
            file.write(place, offset, chunk)
    complete = file.complete
    if complete:
        cache.objects.adopt(file.base + ".data", key)
        file.discard()
    file.close()
    return complete


def store(cache: Cache, seed: int) -> None:
    evictor = Evictor(cache, CacheLimits(_LIMIT, reserve_bytes=0, reserve_percent=0))
    numbers = itertools.count()
    taken = 0
    for turn in itertools.count(1):
        several = {n: content(seed, n) for n in itertools.islice(numbers, _ROUND)}
        stored = [n for n, data in several.items() if _store_one(cache, data, n)]
        taken += sum(map(len, several.values()))
        cache.objects.seal()
        print("sealed", *stored, flush=True)
        if turn % _EVICT_EVERY == 0:
            print("evicting", flush=True)
            evictor.stored(taken)  # which looks, as it is much
            taken = 0


def look(cache: Cache, seed: int, last: int, sealed: list[int]) -> None:
    wrong: list[str] = []
    opened = chunks = 0
    for entry in entries(cache):
        fd = cache.objects.open(entry.key, entry.size) if entry.kind is Kind.OBJECT else None
        if fd is not None:
            opened += 1
            if hashlib.sha256(os.pread(fd, entry.size + 1, 0)).digest() != entry.key:
                wrong.append(entry.key.hex())
            os.close(fd)
    lost = []
    for number in sealed:
        key = hashlib.sha256(content(seed, number)).digest()
        if not cache.objects.verify(key):
            lost.append(number)
    for number in range(0, last, 3):
        data = content(seed, number)
        if not os.path.exists(_base(cache, data) + ".data"):
            continue
        file = _partial(cache, data)
        for place, (offset, chunk) in enumerate(_chunks(data)):
            if file.recall(place, offset, len(chunk), hashlib.sha256(chunk).digest()):
                chunks += 1
                if os.pread(file.fd, len(chunk), offset) != chunk:
                    wrong.append(f"chunk {place} of {number}")
        file.close()
    print(json.dumps({"opened": opened, "chunks": chunks, "lost": lost, "wrong": wrong}))


if __name__ == "__main__":
    the_cache = Cache(sys.argv[2])
    if sys.argv[1] == "store":
        store(the_cache, int(sys.argv[3]))
    else:
        look(the_cache, int(sys.argv[3]), *json.loads(sys.stdin.read()))
