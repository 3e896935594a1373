# SPDX-License-Identifier: Apache-2.0
"""Unpacking in a process: its answers, its end, and that none of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import trio

from lazysnap.errors import DigestMismatch, FormatError, Internal, RegistryUnreachable
from lazysnap.unpack.applier_pool import ApplierPool
from lazysnap.unpack.process import Job
from tests.support.tar_entries import file
from tests.unpack.corpus import compressed, digest, pack

_SECONDS = 120


class _pieces:  # noqa: N801 - used as a function; no generator, which somebody would have to close
    def __init__(self, data: bytes) -> None:
        self._left = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]

    def __aiter__(self) -> _pieces:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)


def _job(blob: bytes, target: Path, **more: object) -> Job:
    target.mkdir(exist_ok=True)
    return Job(target=str(target), size=len(blob), digest=str(digest(blob)), **more)  # type: ignore[arg-type]


async def test_a_layer_is_unpacked(tmp_path: Path) -> None:
    tar = pack([file("a/f", os.urandom(2 << 20), mode=0o666), file("g", b"x")])
    blob = compressed(tar, "gzip")
    answer = await ApplierPool(1).apply(_job(blob, tmp_path / "t"), _pieces(blob))
    assert (answer.diff_id, answer.size, answer.entries) == (str(digest(tar)), len(tar), 2)
    assert (tmp_path / "t/a/f").stat().st_mode & 0o777 == 0o666


async def test_errors_come_back_as_they_are(tmp_path: Path) -> None:
    large = pack([file("f", os.urandom(8 << 20))])
    with pytest.raises(FormatError, match="more than") as caught:
        await ApplierPool(1).apply(_job(large, tmp_path / "t", most_bytes=1000), _pieces(large))
    assert caught.value.reason == "too-big"
    job = _job(large, tmp_path / "t")
    job.digest = str(digest(b"another"))
    with pytest.raises(DigestMismatch):
        await ApplierPool(1).apply(job, _pieces(large))
    assert list((tmp_path / "t").iterdir()) == []


async def test_a_registry_that_fails_on_the_way(tmp_path: Path) -> None:
    blob = pack([file("f", os.urandom(1 << 20))])

    async def broken() -> AsyncGenerator[bytes, None]:
        yield blob[:500_000]
        raise RegistryUnreachable("gone")

    async with contextlib.aclosing(broken()) as pieces:
        with pytest.raises(RegistryUnreachable):
            await ApplierPool(1).apply(_job(blob, tmp_path / "t"), pieces)


async def test_an_early_end_is_no_end(tmp_path: Path) -> None:
    blob = pack([file("f", b"x")])
    cut = blob[:-512]  # a tar may end here; the blob does not

    async def short() -> AsyncGenerator[bytes, None]:
        yield cut
        await trio.sleep_forever()

    async with contextlib.aclosing(short()) as pieces:
        with trio.move_on_after(1):
            await ApplierPool(1).apply(_job(blob, tmp_path / "t"), pieces)
            pytest.fail("an answer without all of the bytes")


def _children() -> set[int]:
    # Of all threads: trio starts processes in one of its own.
    found: set[int] = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended; its children have another now
            found.update(map(int, children.read_text().split()))
    return found


async def test_a_process_that_is_killed(tmp_path: Path) -> None:
    before = _children()

    async def kill() -> None:
        while not (started := _children() - before):
            await trio.sleep(0.01)
        for pid in started:
            os.kill(pid, signal.SIGKILL)

    blob = pack([file("f", b"x")])
    with trio.fail_after(_SECONDS):
        async with (
            contextlib.aclosing(_hanging_after(blob)) as pieces,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(kill)
            with pytest.raises((FormatError, Internal)):
                await ApplierPool(1).apply(_job(blob, tmp_path / "t"), pieces)
    assert _children() <= before


async def _hanging_after(blob: bytes) -> AsyncGenerator[bytes, None]:
    yield blob[:100]
    await trio.sleep_forever()


async def test_cancelling_ends_the_process(tmp_path: Path) -> None:
    before = _children()
    blob = pack([file("f", b"x")])
    async with (
        contextlib.aclosing(_hanging_after(blob)) as pieces,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(ApplierPool(1).apply, _job(blob, tmp_path / "t"), pieces)
        with trio.fail_after(_SECONDS):
            while _children() <= before:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert _children() <= before
