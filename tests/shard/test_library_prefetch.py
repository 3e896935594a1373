# SPDX-License-Identifier: Apache-2.0
"""What a program links to is fetched by whichever shard has it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from lazysnap import channel
from lazysnap.cache import Cache
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.scheduler import Scheduler
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin, SlotRecord, write_slot
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.shard.library_prefetch import LibraryPrefetch
from lazysnap.shard.mounted_layers import Begun, MountedLayers
from lazysnap.shard.served_layer import ServedLayer
from tests.fetch.engine import MemorySource, make_fetcher
from tests.shard.layers import served
from tests.support.elf import make_elf
from tests.support.indexes import resolve, toc_of
from tests.support.layers import Layer, LayerEntry, estargz, file

_LIB = "usr/lib"


class Shards:
    """Two of them, without FUSE, each in the same process."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.root = root
        self.nursery = nursery
        self.blobs: dict[str, Layer] = {}
        self.contents = OpenFiles(Cache(str(root / "cache")))
        self.layers: dict[int, MountedLayers] = {}
        self.libraries: dict[int, LibraryPrefetch] = {}

    async def start(self, number: int) -> None:
        scheduler = Scheduler()
        decoders = trio.CapacityLimiter(1)
        ahead = PrefetchQueue(scheduler, self.nursery)

        def make(origin: LayerOrigin, index: LayerIndex, begun: Begun) -> ServedLayer:
            source = MemorySource(self.blobs[origin.index].blob)
            fetcher = make_fetcher(
                index,
                source,
                self.contents,
                self.nursery,
                scheduler=scheduler,
                decoders=decoders,
                host="h",
                name=origin.index,
            )
            reader = LayerReader(
                index, self.contents, fetcher, begun=lambda node: begun(layer, node)
            )
            layer = served(origin, reader, ahead)
            return layer

        layers = self.layers[number] = MountedLayers(str(self.root), number, make)
        libraries = LibraryPrefetch(layers, ahead, self.nursery)
        self.libraries[number] = libraries
        socket = str(self.root / "shards" / f"{number}.sock")
        await self.nursery.start(channel.serve, socket, {"link": libraries.link})

    def attach(self, slot: int, shard: int, entries: list[LayerEntry], below: list[int]) -> None:
        layer = estargz(entries, chunk_size=64 << 10)
        name = f"index-{slot}"
        (self.root / "cache" / "index" / name).write_bytes(encode(build(toc_of(layer))))
        self.blobs[name] = layer
        record = SlotRecord(
            slot=slot, shard=shard, layer_digest=layer.digest, index=name, reference="h/r:t",
            blob_size=layer.size, below=below,
        )  # fmt: skip
        write_slot(str(self.root), record)

    async def fetched(self, shard: int, slot: int, path: str) -> None:
        """Wait until all of a file is there."""
        layer = await self.layers[shard].load(slot)
        chunks = layer.index.file(resolve(layer.index, path))
        members = range(chunks.first_chunk, chunks.first_chunk + chunks.chunk_count)
        while not all(layer.reader.fetcher.present(layer.index.chunk(i).member) for i in members):
            await trio.sleep(0.01)

    async def read(self, shard: int, slot: int, path: str) -> None:
        layer = await self.layers[shard].load(slot)
        node = resolve(layer.index, path)
        if layer.reader.read_nowait(node, 0, 100) is None:
            await layer.reader.read(node, 0, 100)


@asynccontextmanager
async def _shards(root: Path) -> AsyncIterator[Shards]:
    for name in ("shards", "slots"):
        os.mkdir(root / name)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            it = Shards(root, nursery)
            await it.start(0)
            await it.start(1)
            yield it
            nursery.cancel_scope.cancel()
    it.contents.close()


def _library(*needed: str) -> bytes:
    return make_elf(needed, size=300_000)


async def test_libraries_of_libraries_are_fetched_over_shards(tmp_path: Path) -> None:
    async with _shards(tmp_path) as it:
        it.attach(1, 0, [file(f"{_LIB}/libc.so.6", _library())], [])
        it.attach(2, 1, [file(f"{_LIB}/libm.so.6", _library("libc.so.6", "libm.so.6"))], [1])
        program = file("bin/program", make_elf(["libm.so.6"]), mode=0o755)
        it.attach(3, 0, [program, file("bin/other", b"other", mode=0o755)], [2, 1])
        await it.read(0, 3, "bin/program")
        await it.fetched(1, 2, f"{_LIB}/libm.so.6")
        await it.fetched(0, 1, f"{_LIB}/libc.so.6")


async def test_an_image_that_comes_later_is_looked_up_anew(tmp_path: Path) -> None:
    async with _shards(tmp_path) as it:
        programs = [file(f"bin/{n}", make_elf([f"lib{n}.so"]), mode=0o755) for n in (1, 2)]
        it.attach(1, 0, [*programs, file(f"{_LIB}/lib1.so", _library())], [])
        await it.read(0, 1, "bin/1")
        await it.fetched(0, 1, f"{_LIB}/lib1.so")
        it.attach(2, 1, [file(f"{_LIB}/lib2.so", _library())], [1])
        await it.read(0, 1, "bin/2")
        await it.fetched(1, 2, f"{_LIB}/lib2.so")


async def test_a_shard_that_is_away_keeps_nobody_from_the_rest(tmp_path: Path) -> None:
    async with _shards(tmp_path) as it:
        it.attach(1, 0, [file(f"{_LIB}/libhere.so", _library())], [])
        it.attach(2, 7, [file(f"{_LIB}/libaway.so", _library())], [1])
        program = make_elf(["libaway.so", "libhere.so", "libnowhere.so"])
        it.attach(3, 1, [file("bin/program", program, mode=0o755)], [2, 1])
        await it.read(1, 3, "bin/program")
        await it.fetched(0, 1, f"{_LIB}/libhere.so")
