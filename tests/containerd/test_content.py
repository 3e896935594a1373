# SPDX-License-Identifier: Apache-2.0
"""The content store's write protocol, against a real containerd; checked with ctr."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from lazysnap.containerd.client import Containerd
from lazysnap.containerd.content import CHUNK, Ingest
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, DigestMismatch, InvalidArgument, NotFound
from tests.support.containerd import PrivateContainerd

pytestmark = [pytest.mark.root, pytest.mark.containerd]

BIG = random.Random(1).randbytes(2 * CHUNK + 12345)


async def test_a_blob_of_several_messages(daemon: PrivateContainerd, leased: Containerd) -> None:
    digest = Digest.of(BIG)
    async with leased.content.writer("big", digest, len(BIG)) as writer:
        await writer.write(BIG[:100])
        assert daemon.ingests() == ["big"]
        await writer.write(BIG[100:])
        await writer.commit({"label": "value"})
    assert daemon.contents() == {digest: {"label": "value"}}
    assert await leased.content.read(digest, limit=len(BIG)) == BIG
    with pytest.raises(InvalidArgument):
        await leased.content.read(digest, limit=len(BIG) - 1)
    with pytest.raises(AlreadyExists):
        async with leased.content.writer("again", digest, len(BIG)):
            raise AssertionError("must not be reached")
    assert daemon.ingests() == []
    await leased.content.delete(digest)
    assert not await leased.content.exists(digest)


async def test_a_kept_write_is_resumed(daemon: PrivateContainerd, leased: Containerd) -> None:
    digest = Digest.of(BIG)
    async with leased.content.writer("big", digest, len(BIG)) as writer:
        await writer.write(BIG[:5000])
        writer.keep()
    assert await leased.content.ingests() == [Ingest("big", 5000, len(BIG))]
    async with leased.content.writer("big", digest, len(BIG)) as writer:
        assert writer.offset == 5000
        await writer.write(BIG[writer.offset :])
        await writer.commit({})
    assert list(daemon.contents()) == [digest]


async def test_a_restarted_write_forgets_the_old_bytes(leased: Containerd) -> None:
    digest = Digest.of(BIG)
    async with leased.content.writer("big", digest, len(BIG)) as writer:
        await writer.write(b"wrong")
        await writer.restart()
        await writer.write(BIG)
        await writer.commit({})
    assert await leased.content.read(digest, limit=len(BIG)) == BIG


async def test_wrong_bytes_are_refused_and_nothing_stays(
    daemon: PrivateContainerd, leased: Containerd
) -> None:
    with pytest.raises(DigestMismatch):
        await leased.content.write("x", b"other", Digest.of(b"bytes"), {})
    assert (daemon.contents(), daemon.ingests()) == ({}, [])


async def test_a_cancelled_write_leaves_nothing(
    daemon: PrivateContainerd, leased: Containerd
) -> None:
    with trio.CancelScope() as scope:
        async with leased.content.writer("x", Digest.of(BIG), len(BIG)) as writer:
            await writer.write(BIG[:5000])
            assert daemon.ingests() == ["x"]
            scope.cancel()
            await writer.write(BIG[5000:])
    assert scope.cancelled_caught
    assert daemon.ingests() == []


async def test_a_second_writer_waits_for_the_first(
    daemon: PrivateContainerd, leased: Containerd
) -> None:
    digest, outcomes = Digest.of(BIG), []
    holding = trio.Event()

    async def first() -> None:
        async with leased.content.writer("x", digest, len(BIG)) as writer:
            holding.set()
            # Long enough for the second one's first attempt to be refused.
            await trio.to_thread.run_sync(daemon.ingests)
            await writer.write(BIG)
            await writer.commit({})
            outcomes.append("first")

    async def second() -> None:
        await holding.wait()
        with pytest.raises(AlreadyExists):
            async with leased.content.writer("x", digest, len(BIG)):
                raise AssertionError("must not be reached")
        outcomes.append("second")

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(second)
    assert outcomes == ["first", "second"]


async def test_labels_are_merged(daemon: PrivateContainerd, leased: Containerd) -> None:
    digest = Digest.of(b"x")
    await leased.content.write("x", b"x", digest, {"a/b.c": "1", "d": "2"})
    await leased.content.write("x", b"x", digest, {"d": "3", "e": "4"})
    await leased.content.set_labels(digest, {"e": ""})
    assert daemon.contents() == {digest: {"a/b.c": "1", "d": "3"}}
    with pytest.raises(NotFound):
        await leased.content.set_labels(Digest.of(b"none"), {"a": "b"})


async def test_an_empty_blob(daemon: PrivateContainerd, leased: Containerd) -> None:
    await leased.content.write("x", b"", Digest.of(b""), {})
    assert await leased.content.read(Digest.of(b""), limit=0) == b""


async def test_abort(daemon: PrivateContainerd, leased: Containerd) -> None:
    async with leased.content.writer("x", Digest.of(BIG), len(BIG)) as writer:
        await writer.write(b"1")
        writer.keep()
    await leased.content.abort("x")
    assert daemon.ingests() == []
    with pytest.raises(NotFound):
        await leased.content.abort("x")
