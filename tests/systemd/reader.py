# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a tree without end, and notes how each read went. Runs in a container.

    python3 reader.py LIST LOG

LIST has lines `again|new DIGEST PATH`. Two threads read: one goes round the files marked `again`, which
are soon local, and drops the page cache of each, so that nothing but the stack below can answer; the
other one reads those marked `new` one after the other, in an order of its own, which have to be fetched.
Each read looks the file up, opens it, reads all of it and compares its digest.

LOG gets a line for each read when it has ended: `KIND BEGAN SECONDS OUTCOME PATH`, where BEGAN is that of
CLOCK_MONOTONIC, which is the same for the whole machine, and OUTCOME is `right`, `wrong` or the name of
an errno. Knows nothing of lazysnap, and needs only the standard library.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

# Pauses between two reads. New files are to last, as each can be fetched only once.
_PAUSES = {"again": 0.002, "new": 0.05}


def read(path: str, digest: str) -> str:
    """Read a file with nothing of it in the page cache; the outcome."""
    try:
        size = os.stat(path).st_size
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            data = b""
            while piece := os.read(fd, 1 << 16):
                data += piece
        finally:
            os.close(fd)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    right = len(data) == size and hashlib.sha256(data).hexdigest() == digest
    return "right" if right else "wrong"


def _rounds(kind: str, files: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    order = random.Random(os.getpid())
    while True:
        yield from files if kind == "again" else order.sample(files, len(files))


def _read_on(kind: str, files: Sequence[tuple[str, str]], log: int) -> None:
    for digest, path in _rounds(kind, files):
        began = time.monotonic()
        outcome = read(path, digest)
        line = f"{kind} {began:.6f} {time.monotonic() - began:.6f} {outcome} {path}\n"
        os.write(log, line.encode())
        time.sleep(_PAUSES[kind])


def main() -> None:
    # The first process of a container ignores SIGTERM by default, and a shutdown would wait for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    files: dict[str, list[tuple[str, str]]] = {"again": [], "new": []}
    with open(sys.argv[1]) as lines:
        for line in lines:
            kind, digest, path = line.split()
            files[kind].append((digest, path))
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for kind, wanted in files.items():
        threading.Thread(target=_read_on, args=(kind, wanted, log), daemon=True).start()
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
