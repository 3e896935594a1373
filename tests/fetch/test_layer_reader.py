# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazysnap.cache import objects
from lazysnap.errors import DigestMismatch, LazysnapError, RegistryUnreachable
from tests.fetch.engine import engine
from tests.support import layers
from tests.support.layers import Layer

_RNG = random.Random(3)
FILES = {
    "empty": b"",
    "one": b"1",
    "small": _RNG.randbytes(900),
    "exact": _RNG.randbytes(40_000),
    "big": _RNG.randbytes(333_333),
    "holes": bytes(50_000) + _RNG.randbytes(30_000) + bytes(90_000),
    "zeros": bytes(120_000),
    "twin": b"1",
}
ENTRIES = [layers.file(name, data) for name, data in FILES.items()]
FORMATS: dict[str, Callable[[], Layer]] = {
    "estargz": lambda: layers.estargz(ENTRIES, chunk_size=20_000),
    "shared members": lambda: layers.estargz(ENTRIES, chunk_size=9_000, min_chunk_size=50_000),
    "zstd": lambda: layers.zstd_chunked(ENTRIES, chunk_size=20_000),
    "zstd with holes": lambda: layers.zstd_chunked(
        ENTRIES, dialect="containers", chunk_size=10_000
    ),
}


@pytest.fixture(params=FORMATS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return FORMATS[request.param]()


def _random_layer(size: int, chunk: int = 50_000) -> tuple[Layer, bytes]:
    data = random.Random(size).randbytes(size)
    return layers.estargz([layers.file("f", data)], chunk_size=chunk), data


async def test_every_file_is_what_the_tar_holds(layer: Layer, tmp_path: Path) -> None:
    async with engine(layer, tmp_path) as e:
        for _ in range(2):  # from the network, then from the cache
            for name, data in FILES.items():
                assert await e.read(name) == data


@pytest.mark.parametrize("form", FORMATS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ranges=st.lists(
        st.tuples(
            st.sampled_from(sorted(FILES)),
            st.one_of(st.integers(0, 340_000), st.sampled_from([20_000, 40_000, 19_999, 333_332])),
            st.one_of(st.integers(1, 140_000), st.sampled_from([1, 20_000, 131_072])),
        ),
        min_size=1,
        max_size=12,
    ),
    limit=st.integers(1, 4),
)
def test_random_reads_at_once_equal_the_file(
    form: str, ranges: list[tuple[str, int, int]], limit: int
) -> None:
    """With so few open contents that each read makes others be evicted."""
    got: dict[int, bytes] = {}

    async def main(directory: Path) -> None:
        async with engine(FORMATS[form](), directory, open_limit=limit) as e:

            async def one(number: int, name: str, offset: int, size: int) -> None:
                got[number] = await e.read(name, offset, size)

            async with trio.open_nursery() as nursery:
                for number, asked in enumerate(ranges):
                    nursery.start_soon(one, number, *asked)

    with tempfile.TemporaryDirectory() as directory:
        trio.run(main, Path(directory))
    for number, (name, offset, size) in enumerate(ranges):
        assert got[number] == FILES[name][offset : offset + size]


async def test_overlapping_readers_fetch_each_byte_once(tmp_path: Path) -> None:
    layer, data = _random_layer(3_000_000)
    rng = random.Random(5)
    async with engine(layer, tmp_path) as e:
        e.source.gate = trio.Event()

        async def one() -> None:
            offset, size = rng.randrange(len(data)), rng.randrange(1, 131_072)
            assert await e.read("f", offset, size) == data[offset : offset + size]

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            e.source.gate.set()
        assert e.source.times_fetched() == 1


async def test_the_window_grows_while_reads_are_sequential(tmp_path: Path) -> None:
    layer, data = _random_layer(8 << 20, 64 << 10)
    async with engine(layer, tmp_path) as e:
        for offset in range(0, len(data), 64 << 10):
            await e.read("f", offset, 64 << 10)
        lengths = [length for _, length in e.source.requests]
        assert len(lengths) < 12
        assert max(lengths) > 4 * lengths[0]
        assert e.source.times_fetched() == 1


async def test_a_second_process_needs_no_network(layer: Layer, tmp_path: Path) -> None:
    async with engine(layer, tmp_path) as first:
        for name in FILES:
            await first.read(name)
    async with engine(layer, tmp_path) as second:
        for name, data in FILES.items():
            assert await second.read(name) == data
        assert second.source.requests == []


async def test_a_second_process_goes_on_with_a_partial_file(tmp_path: Path) -> None:
    layer, data = _random_layer(2_000_000)
    async with engine(layer, tmp_path) as first:
        await first.read("f", 0, 300_000)
    async with engine(layer, tmp_path) as second:
        assert await second.read("f") == data
        behind = second.index.member(second.index.chunk(5).member).blob_end
        assert min(start for start, _ in second.source.requests) >= behind


async def test_a_complete_file_becomes_an_object(tmp_path: Path) -> None:
    layer, data = _random_layer(500_000)
    async with engine(layer, tmp_path) as e:
        await e.read("f")
        file = e.index.file(e.node("f"))
        with trio.fail_after(120):
            while not e.contents.cache.objects.exists(file.object_key, file.size):
                await trio.sleep(0.01)
        assert await e.read("f") == data
    assert list((tmp_path / "partial").iterdir()) == []


# What goes wrong.


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]


def _fail(data: bytes) -> bytes:
    raise RegistryUnreachable("the registry is away")


def _defect(data: bytes) -> bytes:
    raise ZeroDivisionError


async def test_wrong_bytes_once_are_asked_for_again(tmp_path: Path) -> None:
    layer, data = _random_layer(200_000)
    async with engine(layer, tmp_path) as e:
        e.source.script = [_flip]
        assert await e.read("f") == data
        assert len(e.source.requests) == 2


@pytest.mark.parametrize("form", FORMATS)
async def test_wrong_bytes_are_never_returned(form: str, tmp_path: Path) -> None:
    async with engine(FORMATS[form](), tmp_path) as e:
        e.source.always = lambda data: bytes(b ^ 1 for b in data)
        for name in ("one", "small", "exact", "big"):
            with pytest.raises(LazysnapError):
                await e.read(name)
        e.source.always = None
        for name, data in FILES.items():
            assert await e.read(name) == data


@pytest.mark.parametrize(
    "fault", [_fail, _defect, lambda data: data[:-1]], ids=["error", "defect", "cut off"]
)
async def test_after_an_error_the_next_read_works(
    fault: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    layer, data = _random_layer(200_000)
    async with engine(layer, tmp_path) as e:
        e.source.script = [fault]
        with pytest.raises(LazysnapError):
            await e.read("f")
        assert e.reader.fetcher.requests.counters.errors == 1
        assert await e.read("f") == data


async def test_a_reader_that_is_cancelled_leaves_the_flight_to_others(tmp_path: Path) -> None:
    layer, data = _random_layer(200_000)
    async with engine(layer, tmp_path) as e:
        e.source.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            impatient = trio.CancelScope()

            async def one() -> None:
                with impatient:
                    await e.read("f")

            async def two() -> None:
                assert await e.read("f") == data

            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(two)
            await trio.testing.wait_all_tasks_blocked()
            impatient.cancel()
            await trio.testing.wait_all_tasks_blocked()
            e.source.gate.set()
        assert e.source.times_fetched() == 1


async def test_a_damaged_partial_file_is_fetched_again(tmp_path: Path) -> None:
    layer, data = _random_layer(2_000_000)
    async with engine(layer, tmp_path) as first:
        await first.read("f", 0, 1)
    (partial,) = (tmp_path / "partial").glob("*.data")
    with partial.open("r+b") as file:
        file.write(b"garbage")
    async with engine(layer, tmp_path) as second:
        assert await second.read("f", 0, 100) == data[:100]


@pytest.mark.parametrize("damage", ["cut off", "changed"])
async def test_a_damaged_object_is_fetched_again(tmp_path: Path, damage: str) -> None:
    layer = layers.estargz([layers.file("f", FILES["small"])])
    async with engine(layer, tmp_path) as first:
        await first.read("f")
    (path,) = [p for p in tmp_path.glob("[oa]*/??/*") if p.stat().st_size == 900]  # objects, aside
    if damage == "changed":
        path.write_bytes(b"x" * 900)
    else:
        os.truncate(path, 10)
    async with engine(layer, tmp_path) as second:
        assert await second.read("f") == FILES["small"]
    async with engine(layer, tmp_path) as third:
        assert await third.read("f") == FILES["small"]
        assert third.source.requests == []


async def test_an_object_cut_off_while_it_is_open_is_fetched_again(tmp_path: Path) -> None:
    layer = layers.estargz([layers.file("f", FILES["small"])])
    async with engine(layer, tmp_path) as e:
        await e.read("f")
        assert await e.read("f") == FILES["small"]
        (path,) = [p for p in tmp_path.glob("[of]*/??/*") if p.stat().st_size == 900]
        os.truncate(path, 10)
        assert await e.read("f") == FILES["small"]


async def test_a_false_claim_of_a_file_digest_is_not_believed(tmp_path: Path) -> None:
    """Two layers claim the same digest for their file; each gets the bytes that its chunks promise."""
    honest_data, other = FILES["big"], random.Random(9).randbytes(len(FILES["big"]))
    honest = layers.estargz([layers.file("f", honest_data)], chunk_size=50_000)
    digest = honest_digest(honest)

    def lie(toc: dict[str, object]) -> None:
        entries = toc["entries"]
        assert isinstance(entries, list)
        entries[0]["digest"] = digest

    lying = layers.estargz([layers.file("f", other)], chunk_size=50_000, edit=lie)
    async with engine(lying, tmp_path) as first:
        assert await first.read("f") == other
    async with engine(honest, tmp_path) as second:
        assert await second.read("f") == honest_data
    async with engine(lying, tmp_path) as third, engine(honest, tmp_path) as fourth:
        assert await fourth.read("f") == honest_data
        # It said itself that its bytes are these.
        assert await third.read("f") in (other, honest_data)


def honest_digest(layer: Layer) -> str:
    return str(json.loads(layer.toc)["entries"][0]["digest"])


async def test_a_claim_of_another_size_does_not_hash_the_object_at_each_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = layers.estargz([layers.file("f", FILES["big"])], chunk_size=50_000)
    async with engine(honest, tmp_path) as first:
        await first.read("f")
        with trio.fail_after(120):
            while list((tmp_path / "partial").iterdir()):
                await trio.sleep(0.01)

    def lie(toc: dict[str, object]) -> None:
        entries = toc["entries"]
        assert isinstance(entries, list)
        entries[0]["digest"] = honest_digest(honest)

    lying = layers.estargz([layers.file("f", FILES["holes"])], chunk_size=50_000, edit=lie)
    hashed: list[int] = []
    original = objects._sha256

    def counting(fd: int) -> bytes:
        hashed.append(fd)
        return original(fd)

    monkeypatch.setattr(objects, "_sha256", counting)
    async with engine(lying, tmp_path) as e:
        for offset in range(0, 100_000, 10_000):
            data = await e.read("f", offset, 10_000)
            assert data == FILES["holes"][offset : offset + 10_000]
    assert len(hashed) <= 1  # when it is complete


async def test_the_same_content_twice_in_a_layer_is_decoded_at_once(tmp_path: Path) -> None:
    data = FILES["big"]
    entries = [layers.file(name, data) for name in ("a", "b", "c")]
    layer = layers.estargz(entries, chunk_size=30_000)
    async with engine(layer, tmp_path) as e, trio.open_nursery() as nursery:

        async def one(name: str) -> None:
            assert await e.read(name) == data

        for name in ("a", "b", "c", "a"):
            nursery.start_soon(one, name)


async def test_two_layers_of_a_process_share_a_file(tmp_path: Path) -> None:
    data = FILES["big"]
    one = layers.estargz([layers.file("x", data)], chunk_size=30_000)
    other = layers.estargz([layers.file("y", data), layers.file("z", b"z")], chunk_size=30_000)
    async with (
        engine(one, tmp_path) as first,
        engine(other, tmp_path, contents=first.contents) as second,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.read, "x")
            nursery.start_soon(second.read, "y")
        assert await first.read("x") == await second.read("y") == data
        before = len(second.source.requests)
        assert await second.read("y", 1000, 500) == data[1000:1500]
        assert len(second.source.requests) == before


async def test_a_gap_in_the_blob_is_not_fetched(tmp_path: Path) -> None:
    """What a table of contents leaves out between two members could be many gigabytes."""
    data = [random.Random(n).randbytes(60_000) for n in range(2)]
    hidden = random.Random(7).randbytes(3 << 20)
    entries = [layers.file("a", data[0]), layers.file("gap", hidden), layers.file("b", data[1])]

    def leave_out(toc: dict[str, object]) -> None:
        found = toc["entries"]
        assert isinstance(found, list)
        # The member before ends where the next boundary is: name one there, and no file.
        found[1] = {**found[1], "name": "gap", "size": 1, "chunkSize": 1}
        found[1]["chunkDigest"] = found[1]["digest"] = _sha256(hidden[:1])

    layer = layers.estargz(entries, edit=leave_out)
    async with engine(layer, tmp_path) as e:
        assert await e.read("a") == data[0]
        assert await e.read("gap") == hidden[:1]
        assert await e.read("b") == data[1]
        assert sum(length for _, length in e.source.requests) < 1 << 20


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def test_evicted_contents_leave_no_descriptor_and_close_none_twice(tmp_path: Path) -> None:
    rng = random.Random(11)
    files = {f"f{n}": rng.randbytes(70_000) for n in range(30)}
    layer = layers.estargz([layers.file(k, v) for k, v in files.items()], chunk_size=20_000)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    async with engine(layer, tmp_path, open_limit=2) as e:
        async with trio.open_nursery() as nursery:

            async def one(name: str, data: bytes) -> None:
                for _ in range(3):
                    assert await e.read(name) == data

            for item in files.items():
                nursery.start_soon(one, *item)
        assert len(os.listdir("/proc/self/fd")) < before + 60
    gc.collect()
    # One of them is the store's directory.
    assert len(os.listdir("/proc/self/fd")) <= before + 20


@pytest.fixture(params=[700, 522], ids=["bytes", "inodes"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """One that is full soon: of data, or of files."""
    small = tmp_path / "small"
    small.mkdir()
    options = f"size=1m,nr_inodes={request.param}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(small)], check=True)
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.root
async def test_a_full_disk_is_not_noticed_by_readers(full_disk: Path) -> None:
    rng = random.Random(12)
    files = {f"f{n}": rng.randbytes(n * 9_000 + 5) for n in range(25)}
    made = [layers.file(name, data) for name, data in files.items()]
    async with engine(layers.estargz(made, chunk_size=30_000), full_disk) as e:
        for _ in range(2):
            for name, data in files.items():
                assert await e.read(name) == data
                middle = len(data) // 2
                assert await e.read(name, middle, 5_000) == data[middle : middle + 5_000]


async def test_the_error_names_the_file(tmp_path: Path) -> None:
    layer, _ = _random_layer(90_000)
    async with engine(layer, tmp_path) as e:
        data = bytearray(layer.blob)
        # Another right gzip member in place of the first: decodable, and not what was promised.
        member = e.index.member(0)
        other = layers.estargz([layers.file("f", b"y" * 90_000)], chunk_size=50_000)
        replacement = other.blob[member.blob_offset : member.blob_offset + 200]
        data[member.blob_offset : member.blob_offset + len(replacement)] = replacement
        e.source.blob = bytes(data)
        with pytest.raises((DigestMismatch, LazysnapError), match=r"/f|damaged|cut off"):
            await e.read("f")


@pytest.mark.parametrize("chunk_size", [0, 100_000])
async def test_what_is_evicted_before_it_is_read_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    data = os.urandom(250_000)
    layer = layers.estargz([layers.file("f", data)], chunk_size=chunk_size or 1 << 20)
    async with engine(layer, tmp_path) as e:
        objects = e.contents.cache.objects
        monkeypatch.setattr(objects, "open", lambda key, size: None)
        monkeypatch.setattr(objects, "exists", lambda key, size: False)
        monkeypatch.setattr(e.contents, "create", lambda index, content: None)
        assert await e.read("f") == data
