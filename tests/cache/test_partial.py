# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lazysnap.cache.partial import PartialFile

CHUNK = 1000
DATA = os.urandom(CHUNK * 4 + 7)
KEY = bytes(range(32))


def _open(directory: Path, **options: object) -> PartialFile:
    return PartialFile(str(directory), KEY, len(DATA), 5, **options)  # type: ignore[arg-type]


def _chunk(number: int) -> bytes:
    return DATA[number * CHUNK : (number + 1) * CHUNK]


def _recall(file: PartialFile, number: int) -> bool:
    data = _chunk(number)
    return file.recall(number, number * CHUNK, len(data), hashlib.sha256(data).digest())


def test_chunks_become_usable_one_by_one(tmp_path: Path) -> None:
    file = _open(tmp_path)
    assert file.missing(0, 4) == [0, 1, 2, 3, 4]
    for number in (4, 0, 2, 1):
        file.write(number, number * CHUNK, _chunk(number))
    assert file.missing(0, 4) == [3]
    assert file.usable(0, 2)
    assert not file.usable(2, 3)
    assert not file.complete
    file.write(3, 3 * CHUNK, _chunk(3))
    assert file.complete
    assert os.pread(file.fd, len(DATA), 0) == DATA


def test_another_process_verifies_before_it_uses(tmp_path: Path) -> None:
    first = _open(tmp_path)
    first.write(1, CHUNK, _chunk(1))
    second = _open(tmp_path)
    assert not second.usable(1, 1)
    assert second.claimed(1)
    assert _recall(second, 1)
    assert second.usable(1, 1)
    assert not _recall(second, 2)


def test_a_claim_without_its_bytes_is_forgotten(tmp_path: Path) -> None:
    first = _open(tmp_path)
    first.write(1, CHUNK, _chunk(1))
    os.pwrite(first.fd, bytes([_chunk(1)[5] ^ 1]), CHUNK + 5)  # as after a power cut
    second = _open(tmp_path)
    assert not _recall(second, 1)
    assert not second.claimed(1)


def test_holes_need_nothing(tmp_path: Path) -> None:
    file = _open(tmp_path, holes=(1, 3))
    assert file.missing(0, 4) == [0, 2, 4]
    assert os.pread(file.fd, CHUNK, CHUNK) == bytes(CHUNK)


@pytest.mark.parametrize("suffix", [".map", ".data"])
def test_a_cut_off_file_is_never_believed(tmp_path: Path, suffix: str) -> None:
    first = _open(tmp_path)
    for number in range(5):
        first.write(number, number * CHUNK, _chunk(number))
    os.truncate(first.base + suffix, 2)
    second = _open(tmp_path)
    usable = [n for n in range(5) if _recall(second, n)]
    assert all(os.pread(second.fd, CHUNK, n * CHUNK) == _chunk(n) for n in usable)
    assert len(usable) < 5


def test_discarding_leaves_open_files_usable(tmp_path: Path) -> None:
    file = _open(tmp_path)
    file.write(0, 0, _chunk(0))
    file.discard()
    assert list(tmp_path.iterdir()) == []
    assert os.pread(file.fd, CHUNK, 0) == _chunk(0)
    file.close()
