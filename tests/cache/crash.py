# SPDX-License-Identifier: Apache-2.0
"""Kills a process at every step of the cache's write path, and looks at what it left.

    python -m tests.cache.crash DIRECTORY

A child stores, adopts, seals, writes partial files and evicts. It kills itself (SIGKILL) right before
its n-th call that changes a file, or in the middle of it if that is a write; n counts up until the
child reaches its end. After each, another process must find only right bytes, everything that was
sealed, nothing that `prune` does not reclaim, and it must be able to do all of the work again. Prints
`{"killed": number, "failures": [...]}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lazysnap.cache import Cache, PartialFile, objects, stamps
from lazysnap.cache.eviction import CacheLimits, Evictor
from lazysnap.cache.inventory import entries
from lazysnap.cache.pruning import leftovers, remove_leftover

_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.truncate", "os.utime"}
# It only matters when several processes store the same; and there are hundreds of syncs here.
objects._TICK_SECONDS = 0.0
CHUNK = 5000
_random = random.Random(11)  # data, not secrets
CONTENTS = {name: _random.randbytes(size) for name, size in
            {"a": 9000, "b": 1, "c": 3 * CHUNK + 17, "d": 2 * CHUNK, "old": 20_000}.items()}  # fmt: skip
KEYS = {name: hashlib.sha256(data).digest() for name, data in CONTENTS.items()}
PARTIALS = {name: hashlib.sha256(b"chunks of " + KEYS[name]).digest() for name in ("c", "d")}


class Killer:
    """Counts the calls that change files, and ends the process at one of them."""

    def __init__(self, at: int, *, torn: bool) -> None:
        self.at = at
        self.torn = torn
        self.count = 0
        self.armed = False

    def install(self) -> None:
        sys.addaudithook(lambda event, _: self.step() if event in _EVENTS else None)
        os.write = self._writing(os.write)  # type: ignore[assignment]  # same signature
        os.pwrite = self._writing(os.pwrite)  # type: ignore[assignment]
        stamps._set_times = self._before(stamps._set_times)
        stamps.sync_filesystem = self._before(stamps.sync_filesystem)

    def step(self) -> bool:
        """Whether it is this call; then the process ends, unless the call is to be torn."""
        if self.armed:
            self.count += 1
            if self.count == self.at and not self.torn:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.armed and self.count == self.at

    def _before(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object) -> None:
            self.step()
            function(*args)

        return call

    def _writing(self, function: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, data: bytes | memoryview, *args: int) -> int:
            if self.step():
                function(fd, memoryview(data)[: len(data) // 2], *args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(fd, data, *args)

        return write


def _chunks(name: str) -> list[tuple[int, bytes]]:
    data = CONTENTS[name]
    return [(at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


def _partial(cache: Cache, name: str) -> PartialFile:
    count = len(_chunks(name))
    return PartialFile(cache.partial, PARTIALS[name], len(CONTENTS[name]), count)


def work(cache: Cache, tell: Callable[[str], object]) -> None:
    """The whole write path; tells what is sealed."""
    store = cache.objects
    store.put(KEYS["old"], CONTENTS["old"])
    store.put(KEYS["a"], CONTENTS["a"])
    store.seal()
    tell("a")
    store.put(KEYS["b"], CONTENTS["b"])
    for name, missing in (("c", 0), ("d", 1)):
        file = _partial(cache, name)
        for number, (offset, data) in list(enumerate(_chunks(name)))[missing:]:
            file.write(number, offset, data)
        if file.complete:
            store.adopt(file.base + ".data", KEYS[name])
            file.discard()
        file.close()
    store.seal()
    tell("b")
    tell("c")
    path = store.path(KEYS["old"])
    os.utime(path, ns=(1, stamps.seal_time(KEYS["old"])))
    Evictor(cache, CacheLimits(50_000, reserve_bytes=0, reserve_percent=0)).look()
    store.put(KEYS["old"], CONTENTS["old"])  # again, over what may be there
    store.put(KEYS["a"], CONTENTS["a"])
    store.seal()
    tell("old")


def check(cache: Cache, sealed: set[str]) -> None:
    """Raises if anything is wrong, lost, or left over."""
    for name, key in KEYS.items():
        data = CONTENTS[name]
        fd = cache.objects.open(key, len(data))
        if fd is None and cache.objects.verify(key):
            fd = cache.objects.open(key, len(data))
            assert fd is not None
        assert fd is not None or name not in sealed - {"old"}, f"{name} was sealed and is gone"
        if fd is not None:
            assert os.pread(fd, len(data) + 1, 0) == data, f"{name} has wrong bytes"
            os.close(fd)
    for name in PARTIALS:
        file = _partial(cache, name)
        for number, (offset, data) in enumerate(_chunks(name)):
            if file.recall(number, offset, len(data), hashlib.sha256(data).digest()):
                assert os.pread(file.fd, len(data), offset) == data
        file.close()
    now = time.time()
    time.time = lambda: now + 7200  # type: ignore[assignment]  # nothing is young any more
    for leftover in leftovers(cache, []):
        remove_leftover(cache, leftover)
    assert leftovers(cache, []) == []
    known = {entry.key.hex() for entry in entries(cache)}
    found = {p.name.partition(".")[0] for p in Path(cache.root).rglob("*") if p.is_file()}
    assert found - known - {"usage", "evicted", "boot"} == set(), "unknown files are left"
    time.time = lambda: now  # type: ignore[assignment]


def _forked(function: Callable[[Callable[[str], object]], None]) -> tuple[int, list[str]]:
    """Run in a child: its exit status, and the lines that it told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        write = os.write  # the killer replaces it, and does not count these

        def tell(line: str) -> None:
            write(writer, line.encode() + b"\n")

        try:
            function(tell)
        except BaseException:
            tell(traceback.format_exc().replace("\n", " | "))
            status = 1
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def attempt(root: Path, at: int, *, torn: bool, anonymous: bool) -> tuple[bool, str]:
    """One child that is killed, and one that looks; whether it was killed, and what is wrong."""

    def killed(tell: Callable[[str], object]) -> None:
        cache = Cache(str(root))
        cache.objects._files.anonymous = anonymous  # as on a file system without O_TMPFILE
        killer = Killer(at, torn=torn)
        killer.install()
        killer.armed = True
        work(cache, tell)

    status, told = _forked(killed)
    if status not in (0, -signal.SIGKILL):
        return False, " ".join(told)

    def look(_: Callable[[str], object]) -> None:
        check(Cache(str(root)), set(told))
        cache = Cache(str(root))
        done: set[str] = set()
        work(cache, done.add)
        check(Cache(str(root)), done)

    outcome, problem = _forked(look)
    return status != 0, "" if outcome == 0 else " ".join(problem)


def main(top: Path) -> None:
    killed = 0
    failures = []
    for torn, anonymous in ((False, True), (True, True), (False, False)):
        at, alive = 0, False
        misses = 0
        while not alive:
            at += 1
            root = top / f"{torn}-{anonymous}-{at}"
            was_killed, problem = attempt(root, at, torn=torn, anonymous=anonymous)
            killed += was_killed
            # Only writes can be torn, so with `torn` most numbers do nothing.
            misses = 0 if was_killed else misses + 1
            alive = misses > (40 if torn else 0)
            if problem:
                failures.append(f"torn={torn} anonymous={anonymous} call {at}: {problem}")
            shutil.rmtree(root)
    print(json.dumps({"killed": killed, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
