# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from lazysnap import oci
from lazysnap.cache import Cache
from lazysnap.digest import Digest
from lazysnap.errors import DigestMismatch, FormatError, Internal, LazysnapError, NotLazy
from lazysnap.fetch.byte_source import Counters
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.tail_source import TailSource
from lazysnap.layers.builder import Job
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.layers.tree_images import tree_name
from lazysnap.layers.view import open_index
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.hosts import RegistrySettings
from tests.fetch.engine import make_fetcher
from tests.support import layers
from tests.support.clocks import jumping_clock
from tests.support.indexes import resolve
from tests.support.layers import Layer
from tests.support.registry import FaultyRegistry, Request, faulty_registry

ENTRIES = [layers.directory("d"), *(layers.file(f"d/{n}", b"%d" % n * 3000) for n in range(50))]


class Bench:
    """An opener and the registry that it asks."""

    def __init__(self, server: FaultyRegistry, opener: Opener, builders: BuilderPool) -> None:
        self.server = server
        self.opener = opener
        self.builders = builders
        self.registry = opener._registry
        self.reference = Reference.parse(f"{server.host}/repo:tag")

    def add(self, *made: Layer) -> Digest:
        """Serve layers; the digest of their manifest."""
        config = json.dumps({"os": "linux", "architecture": "amd64"}).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": {
                "mediaType": oci.OCI_CONFIG,
                "digest": self.server.add_blob(config),
                "size": len(config),
            },
            "layers": [layer.descriptor for layer in made],
        }
        for layer in made:
            self.server.add_blob(layer.blob)
        data = json.dumps(manifest).encode()
        return self.server.add_manifest("repo", "tag", oci.OCI_MANIFEST, data)

    def source(self, layer: Layer, **fields: Any) -> LayerSource:
        return LayerSource(self.reference, Digest.parse(layer.digest), **fields)

    def toc_label(self, layer: Layer) -> Mapping[str, str]:
        """What containerd's clients hand on of the annotations."""
        return {oci.TOC_DIGEST: layer.annotations[oci.TOC_DIGEST]}


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return jumping_clock()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    (tmp_path / "index").mkdir()
    async with faulty_registry() as server, trio.open_nursery() as nursery:
        settings = RegistrySettings(plain_http_hosts=frozenset({server.host}), retry_seconds=30)
        async with Registry(settings) as registry:
            builders = BuilderPool(2)
            nursery.start_soon(builders.run)
            yield Bench(server, Opener(str(tmp_path / "index"), registry, builders), builders)
            nursery.cancel_scope.cancel()


def _again(bench: Bench, **options: Any) -> Opener:
    """As after a restart."""
    old = bench.opener
    return Opener(old._directory, old._registry, old._builders, **options)


async def test_an_unknown_layer_costs_one_round_trip_and_a_known_one_none(bench: Bench) -> None:
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    source = bench.source(layer, annotations=bench.toc_label(layer))
    opened = await bench.opener.open(source)
    assert len(bench.server.log) == 1
    assert opened.blob_size == layer.size
    assert opened.fetched
    assert await _again(bench).open(source) == replace(opened, fetched=False)
    assert len(bench.server.log) == 1
    index = open_index(f"{bench.opener._directory}/{opened.index}")
    assert (index.verified, index.toc_digest) == (True, layer.toc_digest)


@pytest.mark.parametrize("size", [5_000, 60_000])
@pytest.mark.parametrize("form", ["estargz", "zstd"])
async def test_no_byte_is_fetched_twice(bench: Bench, tmp_path: Path, size: int, form: str) -> None:
    """Opened, then read to the last byte: all of a small layer, and one longer than its tail."""
    files = {f"d/{n}": random.Random(n).randbytes(size) for n in range(20)}
    entries = [layers.directory("d"), *(layers.file(name, data) for name, data in files.items())]
    layer = layers.estargz(entries) if form == "estargz" else layers.zstd_chunked(entries)
    bench.add(layer)
    opened = await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
    index = open_index(f"{bench.opener._directory}/{opened.index}")
    blob = bench.registry.blob(bench.reference, Digest.parse(layer.digest), layer.size)
    contents = OpenFiles(Cache(str(tmp_path / "cache")))
    async with trio.open_nursery() as nursery:
        path = f"{bench.opener._directory}/{opened.index}"
        counters = Counters()
        source = TailSource(blob, path, counters)
        fetcher = make_fetcher(index, source, contents, nursery, counters=counters)
        reader = LayerReader(index, contents, fetcher)
        for name, data in files.items():
            assert bytes(await reader.read(resolve(index, name), 0, size)) == data
        nursery.cancel_scope.cancel()
    contents.close()
    asked = sorted(_range(request, layer.size) for request in bench.server.requests(path="/blobs/"))
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(asked))
    tail = layer.size - asked[-1][0]
    assert (len(asked) == 1) == (layer.size == tail)
    assert counters.requests == len(asked) - 1
    assert counters.bytes_fetched == sum(stop - start for start, stop in asked[:-1])


def _range(request: Request, size: int) -> tuple[int, int]:
    """The bytes of a blob that a request asks for."""
    first, _, last = (request.range or "").removeprefix("bytes=").partition("-")
    if not first:
        return max(size - int(last), 0), size
    return int(first), int(last) + 1


async def test_a_redirect_costs_one_more(bench: Bench) -> None:
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    bench.server.redirect = True
    await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
    assert [r.server for r in bench.server.log] == ["registry", "storage"]


@pytest.mark.parametrize("dialect", ["stargz", "containers"])
async def test_the_manifest_is_asked_only_when_the_labels_do_not_tell(
    bench: Bench, dialect: str
) -> None:
    layer = layers.zstd_chunked(ENTRIES, dialect=dialect)
    manifest = bench.add(layer)
    opened = await bench.opener.open(bench.source(layer, manifest=manifest))
    assert len(bench.server.requests(path="/manifests/")) == 1
    assert len(bench.server.requests(path="/blobs/")) == 1
    # All that was known to the one who opened it is enough to open it without the manifest.
    known = bench.source(layer, annotations=opened.annotations, complete=True)
    assert (await _again(bench).open(known)).index == opened.index
    assert len(bench.server.log) == 2


async def test_label_and_manifest_lead_to_the_same_index(bench: Bench) -> None:
    layer = layers.zstd_chunked(ENTRIES)
    manifest = bench.add(layer)
    ahead = await bench.opener.open(bench.source(layer, manifest=manifest))
    asked = await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
    assert ahead.index == asked.index
    assert len(bench.server.requests(path="/blobs/")) == 1


async def test_many_at_once_ask_once(bench: Bench) -> None:
    made = [layers.estargz([*ENTRIES, layers.file("n", b"%d" % n)]) for n in range(4)]
    manifest = bench.add(*made)
    async with trio.open_nursery() as nursery:
        for layer in made * 3:
            nursery.start_soon(bench.opener.open, bench.source(layer, manifest=manifest))
    assert len(bench.server.requests(path="/manifests/")) == 1
    assert len(bench.server.requests(path="/blobs/")) == 4
    assert bench.opener._turns == {}


async def test_a_large_table_of_contents_takes_two(bench: Bench) -> None:
    entries = [layers.file(f"{n:05}", b"%d" % n) for n in range(9_000)]
    layer = layers.estargz(entries, edit=lambda toc: toc.update(padding="%x" % (7**400_000)))
    assert layer.size - layer.toc_offset > 300_000
    bench.add(layer)
    opened = await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
    assert len(bench.server.log) == 2
    assert open_index(f"{bench.opener._directory}/{opened.index}").node_count == 9_001


async def _reason(bench: Bench, source: LayerSource) -> str:
    with pytest.raises(LazysnapError) as caught:
        await bench.opener.open(source)
    assert list(Path(bench.opener._directory).iterdir()) == []
    assert bench.opener._turns == {}
    return caught.value.reason


async def test_what_cannot_be_lazy_says_why(bench: Bench) -> None:
    good, plain = layers.estargz(ENTRIES), layers.plain(ENTRIES)
    legacy = layers.estargz(ENTRIES, legacy=True)
    encrypted = replace(good, media_type=good.media_type + "+encrypted")
    manifest = bench.add(good, plain, legacy)
    wrong = {oci.TOC_DIGEST: str(Digest.of(b"another"))}
    assert await _reason(bench, bench.source(good)) == "no-toc-digest"
    assert await _reason(bench, bench.source(plain, manifest=manifest)) == "no-toc-digest"
    assert await _reason(bench, bench.source(legacy, manifest=manifest)) == "no-toc-digest"
    assert await _reason(bench, bench.source(plain, annotations=wrong)) == "no-toc"
    assert await _reason(bench, bench.source(good, annotations=wrong)) == "digest-mismatch"
    known = bench.source(good, media_type=encrypted.media_type)
    assert await _reason(bench, known) == "encrypted"
    manifest = bench.add(replace(encrypted, annotations={}))
    assert await _reason(bench, bench.source(good, manifest=manifest)) == "encrypted"


async def test_a_promise_of_another_manifest_opens_nothing(bench: Bench) -> None:
    """The blob's digest alone must not lead to an index that somebody else's promise made."""
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
    wrong = {oci.TOC_DIGEST: str(Digest.of(b"another"))}
    with pytest.raises(DigestMismatch):
        await bench.opener.open(bench.source(layer, annotations=wrong))


async def test_unverified_layers_only_if_allowed_and_not_later(bench: Bench) -> None:
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    opener = _again(bench, allow_unverified=True)
    opened = await opener.open(bench.source(layer))
    assert not open_index(f"{bench.opener._directory}/{opened.index}").verified
    with pytest.raises(NotLazy):
        await bench.opener.open(bench.source(layer))


async def test_a_damaged_index_is_made_anew(bench: Bench) -> None:
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    source = bench.source(layer, annotations=bench.toc_label(layer))
    path = Path(bench.opener._directory, (await bench.opener.open(source)).index)
    good = path.read_bytes()
    for damaged in (b"", good[:-1], good[:500] + b"x" + good[501:]):
        path.write_bytes(damaged)
        await bench.opener.open(source)
        assert path.read_bytes() == good


# Builders that misbehave.


@pytest.mark.parametrize(
    ("program", "error", "reason"),
    [
        ("import time; time.sleep(600)", FormatError, "too-big"),
        ("import os; os.kill(os.getpid(), 9)", FormatError, "too-big"),
        ("raise SystemExit(3)", Internal, "internal"),
        ("print('garbage!' * 10)", Internal, "internal"),
        (r"import sys; sys.stdout.buffer.write(b'\0\0\0\1\xc1')", Internal, "internal"),
        (r"import sys; sys.stdout.buffer.write(b'\xff' * 2000000)", Internal, "internal"),
        (r"import sys; sys.stdout.buffer.write(b'\0\0\0\2\x91\1')", Internal, "internal"),
    ],
    ids=["hangs", "killed", "ends", "prints", "not msgpack", "endless", "no answer"],
)
async def test_a_builder_that_misbehaves_is_replaced(
    bench: Bench,
    program: str,
    error: type[LazysnapError],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is started ahead would be another that misbehaves, and be taken for the second try.
    monkeypatch.setattr(bench.builders, "expect", lambda: None)
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    source = bench.source(layer, annotations=bench.toc_label(layer))
    right = bench.builders.command
    bench.builders.command = [sys.executable, "-c", program]
    bench.builders.seconds = 1 if "sleep" in program else 60
    with trio.fail_after(120):
        with pytest.raises(error) as caught:
            await bench.opener.open(source)
        assert caught.value.reason == reason
        bench.builders.command = right
        bench.builders.seconds = 60
        await bench.opener.open(source)


async def test_a_builder_that_died_idle_is_replaced(bench: Bench) -> None:
    for n in range(2):
        layer = layers.estargz([layers.file("f", b"%d" % n)])
        bench.add(layer)
        await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
        for process, *_ in list(bench.builders._idle):
            process.kill()
            await process.wait()


async def test_builders_start_ahead_and_not_too_many(bench: Bench) -> None:
    for _ in range(4):
        bench.opener.expect()
        await trio.sleep(0.2)
    with trio.fail_after(60):
        while not bench.builders._idle:
            await trio.sleep(0.01)
    assert len(bench.builders._idle) <= 2
    waiting = {process.pid for process, *_ in bench.builders._idle}
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    await bench.opener.open(bench.source(layer, annotations=bench.toc_label(layer)))
    assert waiting & {process.pid for process, *_ in bench.builders._idle}


_SLOW_TREES = """
import os, time
from lazysnap.layers import builder
def store(job, index, proper=builder._store_tree):
    while not os.path.exists({go!r}): time.sleep(0.01)
    {then}
    proper(job, index)
builder._store_tree = store
builder.main()
"""


@pytest.mark.parametrize("then", ["", "os._exit(1)"], ids=["made", "killed"])
async def test_a_layer_is_open_before_the_image_of_its_tree_is_made(
    bench: Bench, nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr(bench.builders, "expect", lambda: None)
    go, trees = tmp_path / "go", tmp_path / "trees"
    trees.mkdir()
    program = _SLOW_TREES.format(go=str(go), then=then)
    bench.builders.command = [sys.executable, "-c", program]
    opener = _again(bench, trees=str(trees))
    layer = layers.estargz(ENTRIES)
    bench.add(layer)
    source = bench.source(layer, annotations=bench.toc_label(layer))
    ended: list[object] = []
    told: list[OpenedLayer] = []

    async def ahead() -> None:
        try:
            ended.append(await opener.open(source, told.append))
        except Internal as error:
            ended.append(error)

    nursery.start_soon(ahead)
    with trio.fail_after(120):
        while not opener._indexed:
            await trio.sleep(0.01)
        opened = await opener.open(source)
        assert open_index(f"{bench.opener._directory}/{opened.index}").verified
        assert (opened.fetched, ended, list(trees.iterdir())) == (True, [], [])
        assert told == [opened]
        assert not opener.is_finished(opened)
        go.touch()
        await opener.finished(opened)
        while not ended:
            await trio.sleep(0.01)
    if then:
        assert isinstance(ended[0], Internal)
        assert list(trees.iterdir()) == []
    else:
        assert ended == [opened]
        assert [path.name for path in trees.iterdir()] == [tree_name(opened.index)]
    assert told == [opened]
    assert await opener.open(source, told.append) == opened
    assert told == [opened, opened]
    assert opener.is_finished(opened)


async def test_one_is_kept_that_has_built_nothing(
    nursery: trio.Nursery, clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    builders = BuilderPool(2, kept=1)
    nursery.start_soon(builders.run)
    layer = layers.estargz(ENTRIES)
    job = Job(path=str(tmp_path / "index"), blob_size=layer.size, annotations=layer.annotations)

    async def until_kept() -> int:
        with trio.fail_after(120):
            while [each.used for each in builders._idle] != [False]:
                await trio.sleep(0.01)
        return builders._idle[0].process.pid

    first = await until_kept()
    await builders.build(job, layer.blob)
    assert [each.process.pid for each in builders._idle if each.used] == [first]
    clock.jump(60)  # much longer than one may be idle
    assert await until_kept() != first


async def test_the_largest_that_waits_comes_first(nursery: trio.Nursery) -> None:
    builders = BuilderPool(1)
    order: list[int] = []
    scopes: dict[int, trio.CancelScope] = {}

    async def take(size: int) -> None:
        with trio.CancelScope() as scopes[size]:
            async with builders._turn(size):
                order.append(size)

    async with builders._turn(0):
        for size in (1, 3, 2, 4):
            nursery.start_soon(take, size)
            await trio.testing.wait_all_tasks_blocked()
        scopes[3].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        scopes[4].cancel()  # and before it hears of that, its turn comes
    await trio.testing.wait_all_tasks_blocked()
    assert order == [2, 1]
    assert (builders._running, builders._waiting) == (0, [])


async def test_a_bomb_is_refused_in_time(bench: Bench) -> None:
    """A table of contents of many gigabytes, of which a few megabytes are on the wire."""
    packed = layers._gzip(bytes(300 << 20))
    blob = packed + layers.estargz_footer(0)
    layer = Layer(blob, layers.TAR + "+gzip", {}, b"")
    bench.server.add_blob(blob)
    label = {oci.TOC_DIGEST: str(Digest.of(b"whatever"))}
    with trio.fail_after(120):
        assert await _reason(bench, bench.source(layer, annotations=label)) == "invalid-format"


def test_builders_of_old_releases_are_told_of_the_tail_by_its_old_name() -> None:
    """Between an upgrade and the restart, a daemon and its builders are not of one release."""
    job = Job(path="index", tail_path="index.tail", blob_size=1)
    assert msgspec.to_builtins(job)["seed"] == "index.tail"
    assert msgspec.convert({"path": "index", "seed": "x", "blob_size": 1}, Job).tail_path == "x"
