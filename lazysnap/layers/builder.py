# SPDX-License-Identifier: Apache-2.0
"""Builds the index of a layer in a process of its own: `python -m lazysnap.layers.builder`.

A table of contents comes from outside and may be made to use up memory or time. Here it can use only
this process's, which has limits and is killed when it takes too long; and the memory that building
needs is gone when the process ends. The parent sends frames (see `lazysnap.channel`) on standard
input: the job, then the blob's tail with all of the table of contents. The answer on standard output is a
frame when the index is stored, and if the image of the tree is wanted, another one when that is, too: the
bytes that a start needs can be fetched meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import struct
import sys
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from lazysnap.digest import Digest
from lazysnap.erofs.image import build as build_image
from lazysnap.errors import FormatError, Internal, LazysnapError, NotLazy
from lazysnap.formats.identify import identify
from lazysnap.formats.location import TocLocation
from lazysnap.formats.verify import VerifiedToc, trust_unverified_toc, verify_toc
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.blob_tail import write_tail
from lazysnap.layers.tree_image_file import write_tree

LENGTH = struct.Struct(">I")
# Enough for the largest table of contents that is accepted, with its tree.
MEMORY_LIMIT = 6 << 30
# An index takes some 80 bytes for a file, and so does the image of the tree. What a table of contents
# says of files compresses to next to nothing if it is made for that, so a layer has to be of a fair size:
# 700,000 empty files are allowed in any, and of files with contents more than any layer has.
_INDEX_LEAST = 64 << 20
_INDEX_SHARE = 8


class Job(msgspec.Struct, kw_only=True):
    """An order to build an index.

    Attributes:
        path: where the index goes.
        tree: where the image of the tree goes, see `lazysnap.layers.tree_images`; empty for nowhere.
        tail_path: where the members go that come with the table of contents, see
            `lazysnap.layers.blob_tail`; empty for nowhere.
        blob_size: of the blob, in bytes.
        annotations: of the layer's descriptor.
        media_type: of the layer's descriptor, may be empty.
        toc_digest: promised for the table of contents, if anything is.
        trusted: accept a table of contents for which nothing is promised.
    """

    path: str
    tree: str = ""
    tail_path: str = msgspec.field(name="seed", default="")  # the name for builders of old releases
    blob_size: int
    annotations: dict[str, str] = {}
    media_type: str = ""
    toc_digest: str | None = None
    trusted: bool = False


class Answer(msgspec.Struct, kw_only=True):
    """The outcome of a job: `error` or the rest.

    Attributes:
        error: class, message, hint and reason of the error.
        nodes: number of files and directories.
        total_size: of all regular files, in bytes.
        verified: whether the table of contents was checked against a digest.
    """

    error: tuple[str, str, str | None, str] | None = None
    nodes: int = 0
    total_size: int = 0
    verified: bool = False


def _build(job: Job, tail: bytes) -> LayerIndex:
    """Store an index and what comes with it."""
    location = identify(tail, job.blob_size, job.annotations, job.media_type)
    tail_start = job.blob_size - len(tail)
    start = location.offset - tail_start
    if start < 0:
        raise FormatError("the bytes sent do not hold the table of contents")
    table = _check(job, location, memoryview(tail)[start:])
    layer = build(table)
    data = encode(layer)
    if len(data) > _INDEX_LEAST + _INDEX_SHARE * job.blob_size:
        raise NotLazy(
            f"the layer's index takes {len(data)} bytes, and the layer {job.blob_size}",
            reason="too-costly",
        )
    aside = f"{job.path}.new-{os.getpid()}"
    # Before the index: whoever finds an index does not build it again, and would never have a tail.
    if job.tail_path:
        members = memoryview(tail)[: max(location.data_end - tail_start, 0)]
        write_tail(job.tail_path, tail_start, members)
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, job.path)
    except OSError as error:
        for path in filter(None, (aside, job.tail_path)):
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise Internal(f"cannot store the index: {error}") from error
    return LayerIndex(data)


def _store_tree(job: Job, index: LayerIndex) -> None:
    """Make the image of the tree while everything is at hand; if that fails, its user makes it."""
    with contextlib.suppress(LazysnapError, MemoryError):
        write_tree(job.tree, build_image(index))


def _answers(packed: bytes, tail: bytes) -> Iterator[Answer]:
    """Do a job; what there is to say."""
    try:
        job = msgspec.msgpack.decode(packed, type=Job)
        index = _build(job, tail)
    except LazysnapError as error:
        yield Answer(error=(type(error).__name__, error.message, error.hint, error.reason))
        return
    except MemoryError:
        message = "the table of contents needs too much memory"
        yield Answer(error=("FormatError", message, None, "too-big"))
        return
    answer = Answer(nodes=index.node_count, total_size=index.total_size, verified=index.verified)
    yield answer
    if job.tree:
        _store_tree(job, index)
        yield answer


def _check(job: Job, location: TocLocation, data: memoryview) -> VerifiedToc:
    expected = Digest.parse(job.toc_digest) if job.toc_digest else None
    promised = expected or location.toc_digest or location.frame_digest
    if job.trusted and not promised:
        return trust_unverified_toc(location, data)
    return verify_toc(location, data, expected=expected)


def _read_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def main() -> None:
    """Serve jobs until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # rather this than anything else on the node
    # A tree has no cycles, and collecting while it is built takes a third of the time.
    gc.disable()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (packed := _read_frame(source)) is not None:
        tail = _read_frame(source)
        if tail is None:
            return
        for answer in _answers(packed, tail):
            body = msgspec.msgpack.encode(answer)
            sink.write(LENGTH.pack(len(body)) + body)
            sink.flush()
        del tail


if __name__ == "__main__":
    main()
