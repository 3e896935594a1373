# SPDX-License-Identifier: Apache-2.0
"""Several processes use one cache at once: store, adopt, seal, evict and read."""

from __future__ import annotations

import subprocess
import sys
import tempfile

_PROCESS = """
import hashlib, os, random, sys, time
from lazysnap.cache import Cache, PartialFile
from lazysnap.cache.eviction import CacheLimits, Evictor

cache = Cache(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
evictor = Evictor(cache, CacheLimits(1 << 20, reserve_bytes=0, reserve_percent=0))
contents = [random.Random(n).randbytes(1000 + 3000 * (n % 30)) for n in range(60)]
CHUNK = 20_000
end = time.monotonic() + float(sys.argv[3])
read = 0
while time.monotonic() < end or read < 300:
    number = rng.randrange(len(contents))
    data = contents[number]
    key = hashlib.sha256(data).digest()
    what = rng.randrange(8)
    fd = cache.objects.open(key, len(data))
    if fd is not None:
        assert os.pread(fd, len(data) + 1, 0) == data, "wrong bytes"
        os.close(fd)
        read += 1
    if what < 3:
        cache.objects.put(key, data)
        evictor.stored(len(data))
    elif what < 6:
        chunks = [(at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
        file = PartialFile(cache.partial, hashlib.sha256(key).digest(), len(data), len(chunks))
        for place, (offset, chunk) in enumerate(chunks):
            if rng.randrange(3):
                file.write(place, offset, chunk)
            else:
                file.recall(place, offset, len(chunk), hashlib.sha256(chunk).digest())
            if file.usable(place, place):
                assert os.pread(file.fd, len(chunk), offset) == chunk, "wrong chunk"
        if file.complete:
            try:
                if cache.objects.adopt(file.base + ".data", key):
                    file.discard()
            except FileNotFoundError:
                pass
        file.close()
    elif what == 6:
        cache.objects.seal()
    else:
        cache.objects.verify(key)
"""


def test_processes_that_share_a_cache_see_only_right_bytes() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _PROCESS, directory, str(number), "3"],
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(4)
        ]
        problems = [process.communicate(timeout=600)[1] for process in processes]
        assert problems == [""] * 4
        assert [process.returncode for process in processes] == [0] * 4
