# SPDX-License-Identifier: Apache-2.0
"""Tars for the tests of unpacking, made by stdlib's tarfile, by GNU tar, or byte by byte."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import zstandard

from lazysnap.digest import Digest
from lazysnap.unpack.applier import Applied, Options, apply
from tests.support.tar_entries import Entry, add_entry


class Short:
    """A source whose reads return less than was asked for, each time another number of bytes."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)
        self._turn = 0

    def read(self, size: int) -> bytes:
        self._turn += 1
        return self._stream.read(min(size, 1 + self._turn * 7919 % 5000))


def pack(entries: Iterable[Entry], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of entries, in one of tarfile's formats."""
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for entry in entries:
            add_entry(archive, entry)
    return out.getvalue()


def digest(data: bytes) -> Digest:
    return Digest.of(data)


def compressed(data: bytes, how: str) -> bytes:
    """Compress: `gzip`, `zstd`, `none`, or a `-members` form, in several members or frames."""
    half = len(data) // 2
    parts = [data[:half], b"", data[half:]] if how.endswith("-members") else [data]
    if how.startswith("gzip"):
        return b"".join(gzip.compress(part, 1, mtime=0) for part in parts)
    if how.startswith("zstd"):
        skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00more"
        frames = [zstandard.ZstdCompressor(3).compress(part) for part in parts]
        return (skippable.join(frames) + skippable) if len(parts) > 1 else frames[0]
    return data


def unpack(tar: bytes, target: Path, options: Options | None = None, how: str = "none") -> Applied:
    """Apply a tar to a directory, which is made if it is missing; both digests are checked."""
    target.mkdir(exist_ok=True)
    blob = compressed(tar, how)
    return apply(Short(blob), str(target), options, digest=digest(blob), diff_id=digest(tar))


def gnu_tar(directory: Path, *options: str) -> bytes:
    """What GNU tar makes of a directory."""
    command = ["tar", "--create", "--file=-", f"--directory={directory}", *options, "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


def raw(
    name: bytes,
    kind: bytes = b"0",
    data: bytes = b"",
    *,
    link: bytes = b"",
    size: int | None = None,
    magic: bytes = b"ustar\x0000",
    changes: dict[int, bytes] | None = None,
) -> bytes:
    """A header block with its data, for what no library would write.

    Args:
        changes: bytes at offsets of the block; its checksum is right afterwards.
    """
    block = bytearray(512)

    def put(offset: int, value: bytes) -> None:
        block[offset : offset + len(value)] = value

    put(0, name)
    for offset, field in ((100, b"0000644"), (108, b"0000000"), (116, b"0000000")):
        put(offset, field)
    put(124, b"%011o" % (len(data) if size is None else size))
    put(136, b"%011o" % 1_600_000_000)
    put(156, kind)
    put(157, link)
    put(257, magic)
    for offset, value in (changes or {}).items():
        put(offset, value)
    put(148, b" " * 8)
    put(148, b"%06o\0 " % sum(block))
    return bytes(block) + data + bytes(-len(data) % 512)


END = bytes(1024)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """An extended header with these records."""
    body = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest)
        while length != len(str(length)) + len(rest):
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return raw(b"PaxHeaders/x", kind, body)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
