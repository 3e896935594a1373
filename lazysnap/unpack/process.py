# SPDX-License-Identifier: Apache-2.0
"""Unpacks one layer in a process of its own: `python -m lazysnap.unpack.process`.

Not in a thread of the daemon: making files takes the GIL so often that nothing else would get on there;
a tar comes from outside, and here there are limits on memory and a way to end it at once, wherever it
is; and the mode of new files is independent of the daemon's. Standard input is a frame with the job (see
`lazysnap.channel`) and then the blob to its end; the answer is one frame on standard output.
"""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import sys
from typing import BinaryIO

import msgspec

from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError
from lazysnap.unpack.applier import Options, Whiteouts, apply

LENGTH = struct.Struct(">I")
MEMORY_LIMIT = 2 << 30


class Job(msgspec.Struct, kw_only=True):
    """An order to unpack a layer.

    Attributes:
        target: an empty directory.
        size: of the blob in bytes.
        digest: of the blob.
        whiteouts: `trusted` or `user`, see `Whiteouts`.
        lowers: directories of the layers below, nearest first.
        devices: whether devices can be made.
        most_bytes: limit on the unpacked layer.
        alone: see `Options`.
    """

    target: str
    size: int
    digest: str
    whiteouts: str = "trusted"
    lowers: list[str] = []
    devices: bool = True
    most_bytes: int | None = None
    alone: bool = False


class Answer(msgspec.Struct, kw_only=True):
    """The outcome of a job: `error` or the rest.

    Attributes:
        error: class, message, hint and reason of the error.
        diff_id: of the tar.
        size: of the tar in bytes.
        entries: files and directories in it.
        ignored_xattrs: how many were not set.
        examples: names of some of them.
        left_out: see `Applied`.
    """

    error: tuple[str, str, str | None, str] | None = None
    diff_id: str = ""
    size: int = 0
    entries: int = 0
    ignored_xattrs: int = 0
    examples: list[str] = []
    left_out: list[bytes] = []


class _Input:
    """Exactly the blob's bytes: an early end of standard input is no end of the blob."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._left = size

    def read(self, size: int, /) -> bytes:
        if not self._left:
            return b""
        data = self._stream.read(min(size, self._left))
        if not data:
            raise OSError("the daemon has stopped sending them")
        self._left -= len(data)
        return data


def _unpack(job: Job, stream: BinaryIO) -> Answer:
    options = Options(
        whiteouts=Whiteouts(job.whiteouts),
        lowers=job.lowers,
        devices=job.devices,
        most_bytes=job.most_bytes,
        alone=job.alone,
    )
    source = _Input(stream, job.size)
    try:
        done = apply(source, job.target, options, digest=Digest.parse(job.digest))
    except LazysnapError as error:
        return Answer(error=(type(error).__name__, error.message, error.hint, error.reason))
    except MemoryError:
        message = f"layer {job.digest} needs too much memory to be unpacked"
        return Answer(error=("FormatError", message, None, "too-big"))
    return Answer(
        diff_id=str(done.diff_id),
        size=done.size,
        entries=done.entries,
        ignored_xattrs=done.ignored_xattrs,
        examples=list(done.examples),
        left_out=list(done.left_out),
    )


def main() -> None:
    """Serve one job."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # rather this than anything else on the node
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as source:
        head = _exactly(source, LENGTH.size)
        job = msgspec.msgpack.decode(_exactly(source, LENGTH.unpack(head)[0]), type=Job)
        body = msgspec.msgpack.encode(_unpack(job, source))
    sys.stdout.buffer.write(LENGTH.pack(len(body)) + body)
    sys.stdout.buffer.flush()
    os._exit(0)  # a thread may still wait for bytes that nobody sends


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            sys.exit(1)  # the daemon has ended
        data += more
    return data


if __name__ == "__main__":
    main()
