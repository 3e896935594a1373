# SPDX-License-Identifier: Apache-2.0
"""The layers of a shard: what they hold in memory."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from lazysnap.cache import Cache
from lazysnap.errors import Internal
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.scheduler import Scheduler
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin, SlotRecord, write_slot
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.shard.mounted_layers import Begun, MakeLayer, MountedLayers
from lazysnap.shard.served_layer import Expectation, ServedLayer
from tests.fetch.engine import MemorySource, make_fetcher
from tests.shard.layers import served
from tests.support import layers
from tests.support.clocks import patient_clock
from tests.support.indexes import toc_of

_FILES = 2000


def _resident(path: str) -> int:
    """Bytes of a mapped file that this process is charged with."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name:  # a mapping begins
            inside = line.endswith(path)
        elif inside and name == "Rss":
            size += int(rest.split()[0]) * 1024
    return size


def _maker(layer: layers.Layer, contents: OpenFiles, nursery: trio.Nursery) -> MakeLayer:
    """Serves a layer that is in memory."""
    ahead = PrefetchQueue(Scheduler(), nursery)

    def make(origin: LayerOrigin, index: LayerIndex, begun: Begun) -> ServedLayer:
        source, decoders = MemorySource(layer.blob), trio.CapacityLimiter(1)
        fetcher = make_fetcher(index, source, contents, nursery, decoders=decoders)
        return served(origin, LayerReader(index, contents, fetcher), ahead)

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


async def test_slots_that_are_loaded_at_once_share_their_layer(tmp_path: Path) -> None:
    layer = layers.estargz([layers.file("f", b"content")])
    cache = Cache(str(tmp_path / "cache"))
    (tmp_path / "cache" / "index" / "i").write_bytes(encode(build(toc_of(layer))))
    contents = OpenFiles(cache)
    made = []
    async with trio.open_nursery() as nursery:
        make_one = _maker(layer, contents, nursery)

        def make(origin: LayerOrigin, index: LayerIndex, begun: Begun) -> ServedLayer:
            made.append(make_one(origin, index, begun))
            return made[-1]

        for slot in range(1, 5):
            record = SlotRecord(
                slot=slot,
                shard=0,
                layer_digest=layer.digest,
                index="i",
                reference="r",
                blob_size=layer.size,
            )
            write_slot(str(tmp_path), record)
        mounted = MountedLayers(str(tmp_path), 0, make)
        async with trio.open_nursery() as loading:
            for slot in range(1, 5):
                loading.start_soon(mounted.load, slot)
        assert len(made) == 1
        assert {(await mounted.load(slot)).served for slot in range(1, 5)} == set(made)
        assert sorted(made[0].slots) == [1, 2, 3, 4]
    contents.close()


async def test_an_index_of_another_blob_is_not_served(tmp_path: Path) -> None:
    layer = layers.estargz([layers.file("f", b"content")])
    Path(Cache(str(tmp_path / "cache")).index, "i").write_bytes(encode(build(toc_of(layer))))
    record = SlotRecord(
        slot=1, shard=0, layer_digest=layer.digest, index="i", reference="r", blob_size=1
    )
    write_slot(str(tmp_path), record)

    def make(origin: LayerOrigin, index: LayerIndex, begun: Begun) -> ServedLayer:
        raise AssertionError("it is served")

    with pytest.raises(Internal, match=f"is of a blob of {layer.size} bytes, and not of 1"):
        await MountedLayers(str(tmp_path), 0, make).load(1)


async def test_a_record_that_changes_while_it_is_loaded_leaves_no_layer_behind(
    tmp_path: Path,
) -> None:
    layer = layers.estargz([layers.file("f", b"content")])
    cache = Cache(str(tmp_path / "cache"))
    for name in ("i", "j"):
        (tmp_path / "cache" / "index" / name).write_bytes(encode(build(toc_of(layer))))
    contents = OpenFiles(cache)
    record = SlotRecord(
        slot=1, shard=0, layer_digest=layer.digest, index="i", reference="r", blob_size=layer.size
    )
    write_slot(str(tmp_path), record)
    async with trio.open_nursery() as nursery:
        mounted = MountedLayers(str(tmp_path), 0, _maker(layer, contents, nursery))
        async with trio.open_nursery() as loading:
            loading.start_soon(mounted.load, 1)
            await trio.testing.wait_all_tasks_blocked()
            write_slot(str(tmp_path), msgspec.structs.replace(record, index="j"))
            loading.start_soon(mounted.load, 1)
        (kept,) = [found for name in ("i", "j") if (found := mounted.served(name)) is not None]
        assert kept.slots == [1]
    contents.close()


async def test_a_layer_that_is_expected_is_kept_without_a_slot(tmp_path: Path) -> None:
    layer = layers.estargz([layers.file("f", b"content")])
    cache = Cache(str(tmp_path / "cache"))
    (tmp_path / "cache" / "index" / "i").write_bytes(encode(build(toc_of(layer))))
    contents = OpenFiles(cache)
    record = SlotRecord(
        slot=1, shard=0, layer_digest=layer.digest, index="i", reference="r", blob_size=layer.size
    )
    write_slot(str(tmp_path), record)
    async with trio.open_nursery() as nursery:
        make = _maker(layer, contents, nursery)
        mounted = MountedLayers(str(tmp_path), 0, make)
        async with mounted.expecting(record, Expectation([])) as layer_i:
            async with mounted.expecting(record, Expectation([])) as again:
                assert again is layer_i
            assert mounted.served("i") is layer_i
            assert layer_i.slots == []
            assert (await mounted.load(1)).served is layer_i
            mounted.forget(1)
            assert mounted.served("i") is layer_i
            await mounted.load(1)
        assert layer_i.slots == [1]
        assert (await mounted.load(1)).served is layer_i
        assert not layer_i.closed
        mounted.forget(1)
        assert layer_i.closed
        assert mounted.served("i") is None
        assert (await mounted.load(1)).served is not layer_i
        absent = msgspec.structs.replace(record, index="absent")
        with pytest.raises(Internal):
            async with mounted.expecting(absent, Expectation([])):
                pass
        assert mounted.served("absent") is None
    contents.close()


async def test_an_index_takes_memory_only_while_it_is_read(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    layer = layers.estargz([layers.file(f"{n:04}", b"%d" % n) for n in range(_FILES)])
    cache = Cache(str(tmp_path / "cache"))
    path = tmp_path / "cache" / "index" / "i"
    path.write_bytes(encode(build(toc_of(layer))))
    contents = OpenFiles(cache)
    async with trio.open_nursery() as nursery:
        make = _maker(layer, contents, nursery)
        record = SlotRecord(
            slot=1,
            shard=0,
            layer_digest=layer.digest,
            index="i",
            reference="r",
            blob_size=layer.size,
        )
        write_slot(str(tmp_path), record)
        mounted = MountedLayers(str(tmp_path), 0, make)
        nursery.start_soon(mounted.tidy)

        # All of it was read, as its checksum was compared.
        index = (await mounted.load(1)).index
        assert _resident(str(path)) == 0
        sizes = [index.attributes(node).size for node in range(index.node_count)]
        assert _resident(str(path)) > _FILES * 50
        await trio.sleep(60)
        assert _resident(str(path)) == 0
        assert [index.attributes(node).size for node in range(index.node_count)] == sizes
        nursery.cancel_scope.cancel()
    contents.close()
