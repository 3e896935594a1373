# SPDX-License-Identifier: Apache-2.0
"""Reads files and directories in several ways and prints the seconds it took, as JSON.

A program of its own, so that its start is not measured and it can be killed if it hangs. Imports
only the standard library and nothing of the project.

usage: reader.py walk DIRECTORY              lstat of everything on the file system
       reader.py tree DIRECTORY PROCESSES    every regular file, by so many processes
       reader.py shuffled DIRECTORY          every file, in random order
       reader.py sequential FILE BYTES       so many from the start (0: all)
       reader.py parts FILE PROCESSES        the file in equal parts, a process each
       reader.py pages FILE COUNT            4 KiB at random places; p50 and p99 of the latency
"""

from __future__ import annotations

import json
import os
import random
import stat
import sys
import time
from collections.abc import Callable, Iterator

_BLOCK = 1 << 17
_PAGE = 4096


def walk(root: str) -> dict[str, float]:
    return {"entries": sum(1 for _ in _walk(root))}


def tree(root: str, processes: str) -> dict[str, float]:
    count = int(processes)
    files = [path for path, mode in _walk(root) if stat.S_ISREG(mode)]

    def read(number: int) -> None:
        for path in files[number::count]:
            _read(path)

    _fork(count, read)
    return {"files": len(files)}


def shuffled(root: str) -> dict[str, float]:
    files = sorted(os.listdir(root))
    random.Random(1).shuffle(files)
    for name in files:
        _read(os.path.join(root, name))
    return {"files": len(files)}


def sequential(path: str, limit: str) -> dict[str, float]:
    return {"bytes": _read(path, limit=int(limit))}


def parts(path: str, processes: str) -> dict[str, float]:
    count = int(processes)
    size = os.stat(path).st_size
    bounds = [size * number // count for number in range(count + 1)]

    def read(number: int) -> None:
        _read(path, bounds[number], bounds[number + 1] - bounds[number])

    _fork(count, read)
    return {"bytes": size}


def pages(path: str, count: str) -> dict[str, float]:
    source = random.Random(2)
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    # Or the kernel reads ahead what nobody has asked for.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    took = []
    for _ in range(int(count)):
        place = source.randrange(size // _PAGE) * _PAGE
        began = time.perf_counter()
        os.pread(descriptor, _PAGE, place)
        took.append(time.perf_counter() - began)
    took.sort()
    return {"p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100]}


def _walk(root: str) -> Iterator[tuple[str, int]]:
    device = os.lstat(root).st_dev
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            found = os.lstat(path)
            if name in folders and found.st_dev != device and not stat.S_ISLNK(found.st_mode):
                folders.remove(name)
            yield path, found.st_mode


def _read(path: str, start: int = 0, limit: int = 0) -> int:
    left = limit or 1 << 62
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if start:
            os.lseek(descriptor, start, os.SEEK_SET)
        while left and (data := os.read(descriptor, min(_BLOCK, left))):
            left -= len(data)
    finally:
        os.close(descriptor)
    return (limit or 1 << 62) - left


def _fork(count: int, work: Callable[[int], None]) -> None:
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    if any(ends):
        raise SystemExit("a reading process failed")


def main() -> None:
    ways: dict[str, Callable[..., dict[str, float]]] = {
        one.__name__: one for one in (walk, tree, shuffled, sequential, parts, pages)
    }
    way, *arguments = sys.argv[1:]
    began = time.monotonic()
    result = ways[way](*arguments)
    print(json.dumps({"seconds": time.monotonic() - began, **result}))


if __name__ == "__main__":
    main()
