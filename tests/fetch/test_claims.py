# SPDX-License-Identifier: Apache-2.0
"""What a layer says of its files, size and digest, changes nothing for the files of others."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazysnap.cache import objects
from lazysnap.errors import DigestMismatch
from lazysnap.fetch import layer_reader
from lazysnap.fetch.open_files import OpenFiles, Parts
from tests.fetch.engine import Engine, engine
from tests.support import layers
from tests.support.layers import Layer

SMALL = random.Random(1).randbytes(900)
BIG = random.Random(2).randbytes(200_000)
OTHER = random.Random(3).randbytes(200_000)


def _lying(data: bytes, chunk_size: int = 1 << 20, **claims: object) -> Layer:
    """A layer of one file, of which the table of contents says something else."""

    def edit(toc: dict[str, Any]) -> None:
        toc["entries"][0] |= claims

    return layers.estargz([layers.file("f", data)], chunk_size=chunk_size, edit=edit)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _object(e: Engine, data: bytes) -> bool:
    return e.contents.cache.objects.exists(hashlib.sha256(data).digest(), len(data))


@pytest.mark.parametrize("size", [899, 901, 5000])
async def test_a_wrong_size_removes_no_object_of_another_layer(tmp_path: Path, size: int) -> None:
    honest = layers.estargz([layers.file("f", SMALL)])
    data = random.Random(4).randbytes(size)
    lying = _lying(data, digest=_digest(SMALL), chunkDigest=_digest(SMALL))
    async with (
        engine(honest, tmp_path) as first,
        engine(lying, tmp_path, contents=first.contents) as second,
    ):
        for _ in range(2):
            assert await first.read("f") == SMALL
        for _ in range(2):
            with pytest.raises(DigestMismatch):
                await second.read("f")
            assert _object(first, SMALL)
        first.source.requests.clear()
        assert await first.read("f") == SMALL
        assert first.source.requests == []


async def test_an_object_is_not_taken_for_the_partial_file_that_has_its_name(
    tmp_path: Path,
) -> None:
    """The name of a partial file is a digest, too: of bytes that any layer can have as a file."""
    honest = layers.estargz([layers.file("f", BIG)], chunk_size=50_000)
    chunks = [BIG[at : at + 50_000] for at in range(0, len(BIG), 50_000)]
    name_of = b"lazysnap file 1\0" + hashlib.sha256(BIG).digest()
    for chunk in chunks:
        name_of += struct.pack("<QB", len(chunk), 0) + hashlib.sha256(chunk).digest()
    hostile = layers.estargz([layers.file("f", name_of)])
    async with (
        engine(honest, tmp_path) as first,
        engine(hostile, tmp_path, contents=first.contents) as second,
    ):
        partial_key = first.index.file(first.node("f")).partial_key
        assert hashlib.sha256(name_of).digest() == partial_key
        for _ in range(2):
            assert await second.read("f") == name_of
        assert await first.read("f", 60_000, 100) == BIG[60_000:60_100]
        assert await first.read("f") == BIG
        assert await second.read("f") == name_of


async def test_a_partial_file_is_not_taken_for_the_object_that_a_layer_claims(
    tmp_path: Path,
) -> None:
    honest = layers.estargz([layers.file("f", BIG)], chunk_size=50_000)
    async with engine(honest, tmp_path) as first:
        file = first.index.file(first.node("f"))
        assert file.partial_key is not None
        assert await first.read("f", 0, 100) == BIG[:100]
        lying = _lying(OTHER, 50_000, digest=f"sha256:{file.partial_key.hex()}")
        async with engine(lying, tmp_path, contents=first.contents) as second:
            assert await second.read("f", 0, 100) == OTHER[:100]
            assert await second.read("f") == OTHER
        first.source.requests.clear()
        assert await first.read("f", 100, 100) == BIG[100:200]
        assert first.source.requests == []


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 100, 1 << 40])
async def test_a_size_that_no_disk_has_does_not_fail_the_cache(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[OSError] = []
    monkeypatch.setattr(OpenFiles, "complain", lambda self, error: complaints.append(error))
    async with engine(_sparse(size), tmp_path) as e:
        assert await e.read("f", size, 64) == SMALL[:64]
        assert await e.read("f", size - 10, 20) == bytes(10) + SMALL[:10]
        assert await e.read("f", 7, 20) == bytes(20)
    assert complaints == []


async def test_a_failed_read_does_not_remove_an_object_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_on = layer_reader._read_on
    failures = [True, False]

    def failing(fd: int, size: int, offset: int) -> bytes:
        return read_on(fd, size - failures.pop(0), offset)

    async with engine(layers.estargz([layers.file("f", SMALL)]), tmp_path) as e:
        await e.read("f")
        e.source.requests.clear()
        monkeypatch.setattr(layer_reader, "_read_on", failing)
        assert await e.reader.read(e.node("f"), 0, 900) == SMALL
        assert failures == []
        assert e.source.requests == []


def _sparse(hole: int, data: bytes = SMALL[:64]) -> Layer:
    """A layer of a file that is a hole and then some bytes."""

    def edit(toc: dict[str, Any]) -> None:
        (entry,) = (each for each in toc["entries"] if each["name"] == "f")
        entry |= {"size": hole + len(data), "chunkSize": hole, "chunkType": "zeros"}
        entry["digest"] = _digest(bytes(hole) + data) if hole < 1 << 30 else _digest(data)
        del entry["chunkDigest"]
        chunk = {"name": "f", "type": "chunk", "offset": entry["offset"], "chunkOffset": hole}
        at = toc["entries"].index(entry) + 1
        toc["entries"].insert(at, chunk | {"chunkSize": len(data), "chunkDigest": _digest(data)})

    return layers.estargz([layers.file("f", data)], edit=edit)


@pytest.mark.parametrize(
    ("hole", "stored", "promoted"),
    [(40 << 30, 64, False), (5 << 20, 1 << 20, False), (1 << 20, 1 << 20, True)],
)
async def test_making_an_object_costs_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hole: int, stored: int, promoted: bool
) -> None:
    hashed: list[int] = []
    outcomes: list[bool] = []
    settled = trio.Event()
    sha256, promote = objects._sha256, OpenFiles.promote

    def counting(fd: int) -> bytes:
        hashed.append(fd)
        return sha256(fd)

    def recording(self: OpenFiles, *args: Any) -> bool:
        outcomes.append(promote(self, *args))
        trio.from_thread.run_sync(settled.set)
        return outcomes[-1]

    monkeypatch.setattr(objects, "_sha256", counting)
    monkeypatch.setattr(OpenFiles, "promote", recording)
    data = random.Random(5).randbytes(stored)
    async with engine(_sparse(hole, data), tmp_path) as e:
        assert await e.read("f", hole, stored) == data
        with trio.fail_after(120):
            await settled.wait()
        assert (outcomes, bool(hashed)) == ([promoted], promoted)
        assert await e.read("f", hole - 10, 20) == bytes(10) + data[:10]
        e.source.requests.clear()
        assert await e.read("f", hole, stored) == data
        assert e.source.requests == []


async def test_promotions_wait_without_keeping_their_files_open(tmp_path: Path) -> None:
    entries = [layers.file(f"f{n}", BIG[n:]) for n in range(12)]
    layer = layers.estargz(entries, chunk_size=100_000)
    async with engine(layer, tmp_path, open_limit=3) as e:
        promotions = e.contents.threads.promotions
        async with promotions:
            # Backwards, so that nothing of another file is fetched along: its partial file would be closed.
            for n in reversed(range(12)):
                assert await e.read(f"f{n}") == BIG[n:]
            with trio.fail_after(120):
                while promotions.statistics().tasks_waiting < 12:
                    await trio.sleep(0.01)
            parts = [each for each in e.contents._open.values() if isinstance(each, Parts)]
            assert len(parts) <= 3
            assert not any(each.users for each in parts)
        with trio.fail_after(120):
            while list((tmp_path / "partial").iterdir()):
                await trio.sleep(0.01)
        e.source.requests.clear()
        for n in range(12):
            assert await e.read(f"f{n}") == BIG[n:]
        assert e.source.requests == []


async def _from_network(e: Engine) -> None:
    assert await e.read("f") == BIG


async def _from_disk(e: Engine) -> None:
    assert await e.reader.read(e.node("f"), 0, len(BIG)) == BIG


@pytest.mark.parametrize("reads", [_from_network, _from_disk])
async def test_no_other_work_takes_the_threads_of_readers(
    tmp_path: Path, reads: Callable[[Engine], Any]
) -> None:
    layer = layers.estargz([layers.file("f", BIG)], chunk_size=50_000)
    if reads is _from_disk:
        async with engine(layer, tmp_path) as first:
            await first.read("f")
    async with engine(layer, tmp_path) as e:
        others = trio.to_thread.current_default_thread_limiter()
        for _ in range(int(others.total_tokens)):
            others.acquire_on_behalf_of_nowait(object())
        async with e.contents.threads.promotions, e.contents.threads.large_checks:
            with trio.fail_after(60):
                await reads(e)
