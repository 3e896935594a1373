# SPDX-License-Identifier: Apache-2.0
"""Bytes of a blob that came along with its table of contents, kept for whoever wants the members in them.

A *tail* is a file beside the index, `<index name>.tail`: a header (magic, blob offset of the first
byte, SHA-256 of that offset and the bytes) and the bytes. It is only a saving: one that is missing or
damaged is as good as none. The bytes deserve no more trust than those that a registry sends, and are
checked by the digests of their chunks like these. Knows nothing of trio, as builders must start fast.

Invariant: a tail that can be seen under its name was written by one process, all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from dataclasses import dataclass

SIZE_MOST = 2 << 20
_HEADER = struct.Struct("<8sQ32s")
_MAGIC = b"lazytail"


@dataclass(frozen=True, slots=True)
class BlobTail:
    """What a tail file holds.

    Attributes:
        path: of the file.
        start: offset in the blob of its first byte.
        stop: offset in the blob behind its last byte.
        header: by which a file that has replaced it is told apart.
    """

    path: str
    start: int
    stop: int
    header: bytes


def write_tail(path: str, start: int, data: bytes | memoryview) -> None:
    """Store a tail, if it can be stored and is of a fair size.

    Not synced: after a power cut the digest tells whether the bytes are there.

    Args:
        path: of the file.
        start: offset of the bytes in the blob.
        data: the bytes.
    """
    if not 0 < len(data) <= SIZE_MOST:
        return
    aside = f"{path}.new-{os.getpid()}"
    try:
        with open(aside, "wb") as file:
            file.write(_header(start, data))
            file.write(data)
        os.rename(aside, path)
    except OSError:
        # Others, who cannot go on, report that the disk is full.
        with contextlib.suppress(OSError):
            os.unlink(aside)


def open_tail(path: str) -> BlobTail | None:
    """Read all of a tail and check it; None if there is none that can be used."""
    try:
        with open(path, "rb") as file:
            packed = file.read(_HEADER.size + SIZE_MOST + 1)
    except OSError:
        return None
    if not _HEADER.size < len(packed) <= _HEADER.size + SIZE_MOST:
        return None
    header, data = packed[: _HEADER.size], memoryview(packed)[_HEADER.size :]
    _, start, _ = _HEADER.unpack(header)
    if header != _header(start, data):
        return None
    return BlobTail(path, start, start + len(data), header)


def read_tail(tail: BlobTail, start: int, stop: int) -> bytes | None:
    """Bytes `start` to `stop` (exclusive) of the blob, which lie within the tail; None if it is gone."""
    try:
        fd = os.open(tail.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.pread(fd, _HEADER.size, 0) != tail.header:
            return None
        data = os.pread(fd, stop - start, _HEADER.size + start - tail.start)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if len(data) == stop - start else None


def _header(start: int, data: bytes | memoryview) -> bytes:
    hasher = hashlib.sha256(start.to_bytes(8, "little"))
    hasher.update(data)
    return _HEADER.pack(_MAGIC, start, hasher.digest())
