# SPDX-License-Identifier: Apache-2.0
"""Chunks, members and content keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from lazysnap.errors import FormatError, NotLazy
from lazysnap.index.model import MAX_CHUNK_SIZE, NO_KEY
from lazysnap.index.reader import LayerIndex
from tests.support import layers
from tests.support.indexes import index_of, read, resolve
from tests.support.layers import Layer, file

D1, D2, D3 = ("sha256:" + c * 64 for c in "123")


def table(*entries: dict[str, Any], data: int = 1000) -> Layer:
    toc = json.dumps({"version": 1, "entries": entries}).encode()
    return layers.finish_estargz(bytes(data), toc)


def reg(name: str, size: int, **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": "reg", "size": size, "chunkDigest": D1, "offset": 10, **fields}


def chunk(name: str, at: int, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "type": "chunk",
        "chunkOffset": at,
        "chunkDigest": D2,
        "offset": 20,
        **fields,
    }


def test_chunks_of_a_file() -> None:
    index = index_of(
        table(
            reg("f", 25, chunkSize=10, digest=D3),
            chunk("f", 10, chunkSize=10),
            chunk("f", 20, offset=30),
        )
    )
    node = resolve(index, "f")
    content = index.file(node)
    assert (content.size, content.chunk_count) == (25, 3)
    assert [index.chunk(content.first_chunk + i).size for i in range(3)] == [10, 10, 5]
    expected = {0: 0, 9: 0, 10: 1, 19: 1, 20: 2, 24: 2}
    assert {at: index.chunk_at(node, at) for at in expected} == expected
    assert index.chunk_at(node, 25) == index.chunk_at(node, -1) == -1
    assert [index.member(i)[:2] for i in range(3)] == [(10, 20), (20, 30), (30, 1000)]


@pytest.mark.parametrize(
    "entries",
    [
        [reg("f", 25, chunkSize=10)],
        [reg("f", 25, chunkSize=30)],
        [reg("f", 25, chunkSize=-1)],
        [reg("f", 25, chunkOffset=1)],
        [reg("f", 25, chunkSize=10), chunk("f", 9)],
        [reg("f", 25, chunkSize=10), chunk("f", 11)],
        [reg("f", 25, chunkSize=10), chunk("f", 10, chunkSize=10)],
        [reg("f", 25, chunkSize=10), chunk("f", 10, chunkSize=20)],
        [reg("f", 25), chunk("f", 25)],
        [reg("f", 25, chunkSize=10), chunk("f", -10)],
        [reg("f", 25, chunkSize=10), chunk("g", 10)],
        [reg("f", 0), chunk("f", 0)],
        [chunk("f", 0)],
        [reg("f", 5), {"name": "d", "type": "dir"}, chunk("f", 5)],
        [reg("f", 5, offset=-1)],
        [reg("f", 5, offset=1000)],
        [reg("f", 5, offset=2**70)],
        [reg("f", 5, innerOffset=-1)],
        [reg("f", 5, endOffset=1001)],
        [reg("f", 5, chunkType="holes")],
        [reg("f", 5, chunkDigest="sha256:12")],
        [reg("f", 5, chunkDigest="md5:" + "1" * 32)],
        [reg("f", 5, chunkDigest="sha256: " + "1" * 63)],
        [reg("f", 5, digest=D2)],
        [reg("f", 5), reg("g", 5)],
        [reg("f", 5), reg("g", 5, innerOffset=4)],
    ],
)
def test_chunks_that_contradict(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(FormatError):
        index_of(table(*entries))


def test_a_huge_claimed_file_of_zeros_costs_nothing() -> None:
    index = index_of(table(reg("f", 2**62, chunkType="zeros", chunkDigest="", digest=D3)))
    assert index.total_size == 2**62
    found = index.chunk(index.chunk_at(resolve(index, "f"), 2**61))
    assert (found.member, found.size, found.digest) == (-1, 2**62, None)
    with pytest.raises(FormatError, match="too large"):
        index_of(table(*[reg(name, 2**62, chunkType="zeros") for name in "ab"]))


@pytest.mark.parametrize(
    "entry",
    [
        reg("f", MAX_CHUNK_SIZE + 1),
        reg("f", 2**62),
        reg("f", 5, innerOffset=MAX_CHUNK_SIZE + (1 << 20)),
    ],
)
def test_chunks_too_large_to_decode(entry: dict[str, Any]) -> None:
    with pytest.raises(NotLazy) as caught:
        index_of(table(entry))
    assert caught.value.reason == "chunk-too-large"


@pytest.mark.parametrize(("count", "size"), [(4096, 1), (4097, 511), (6000, 512)])
@pytest.mark.parametrize("zeros", ["", "zeros"])
def test_chunks_too_small_to_look_at_each(count: int, size: int, zeros: str) -> None:
    first = reg("f", count * size, chunkSize=size, chunkType=zeros)
    more = (chunk("f", n * size, chunkSize=size, offset=20 + n) for n in range(1, count))
    layer = table(first, *more, data=20_000)
    if (count, size) == (4097, 511):
        with pytest.raises(NotLazy) as caught:
            index_of(layer)
        assert caught.value.reason == "too-costly"
    else:
        assert index_of(layer).file(1).chunk_count == count


@pytest.mark.parametrize("count", [16_384, 16_385])
def test_too_many_chunks_in_a_member(count: int) -> None:
    layer = table(*(reg(f"{n}", 5, innerOffset=1024 * n) for n in range(count)))
    if count > 16_384:
        with pytest.raises(NotLazy) as caught:
            index_of(layer)
        assert caught.value.reason == "too-costly"
    else:
        assert index_of(layer).member(0).chunk_count == count


def test_the_digest_of_a_file_serves_its_only_chunk() -> None:
    index = index_of(table(reg("f", 5, digest=D3, chunkDigest="")))
    content = index.file(resolve(index, "f"))
    assert content.object_key == index.chunk(0).digest == bytes.fromhex(D3[7:])
    assert content.partial_key is None


def test_chunks_without_digests() -> None:
    missing = [reg("f", 5, chunkDigest="")]
    several = [reg("f", 25, chunkSize=10, digest=D3), chunk("f", 10, chunkDigest="")]
    for entries in (missing, several):
        with pytest.raises(NotLazy) as caught:
            index_of(table(*entries))
        assert caught.value.reason == "unverified-chunks"
        index = index_of(table(*entries), trust=True)
        assert not index.verified
        content = index.file(resolve(index, "f"))
        assert content.object_key == NO_KEY  # never an object
        assert content.partial_key is not None
        other = index_of(table(*entries, {"name": "x", "type": "dir"}), trust=True)
        assert other.file(resolve(other, "f")).partial_key != content.partial_key


def test_legacy_stargz_reads_back_when_trusted() -> None:
    layer = layers.estargz([file("f", b"data" * 999)], chunk_size=1000, legacy=True)
    index = index_of(layer, trust=True)
    assert index.kind == "stargz"
    assert read(index, layer.blob, resolve(index, "f")) == b"data" * 999


def keys(*entries: dict[str, Any]) -> tuple[bytes, bytes | None]:
    index = index_of(table(*entries))
    return index.file(resolve(index, "f"))[3:]


def test_partial_keys_depend_on_every_chunk() -> None:
    first = reg("f", 20, chunkSize=10, digest=D3)
    second = chunk("f", 10)
    key = keys(first, second)
    assert key[0] == bytes.fromhex(D3[7:])
    # Where the bytes are does not matter, nor what else is in the layer.
    assert keys(first, {**second, "offset": 500}) == key
    assert keys({**first, "mode": 0o600}, second, reg("g", 1, offset=700)) == key
    others = [
        keys(first, {**second, "chunkDigest": D1}),
        keys({**first, "chunkDigest": D2}, second),
        keys({**first, "digest": D1}, second),
        keys({**first, "chunkSize": 11}, {**second, "chunkOffset": 11}),
        keys(first, {**second, "chunkType": "zeros"}),
        keys({**first, "size": 21}, second),
    ]
    assert len({key[1], *(other[1] for other in others)}) == len(others) + 1


def test_a_file_of_unknown_digest_never_is_an_object() -> None:
    assert keys(reg("f", 20, chunkSize=10), chunk("f", 10))[0] == NO_KEY


def test_members_are_shared_and_bounded() -> None:
    layer = layers.estargz([file(f"f{i}", b"%d" % i * 600) for i in range(10)], min_chunk_size=3000)
    index = index_of(layer)
    assert 1 < index.member_count < 10
    seen: list[int] = []
    for number in range(index.member_count):
        found = index.member_chunks(number)
        inner = [index.chunk(i).inner_offset for i in found]
        assert inner == sorted(inner)
        assert index.member(number).chunk_count == len(found)
        seen += found
    assert sorted(seen) == list(range(10))


def test_a_member_ends_where_nothing_more_is_needed() -> None:
    index = index_of(table(reg("f", 5), data=10 << 20))
    assert index.member(0).blob_end < 1 << 20


def test_end_offsets_and_hidden_files_bound_members() -> None:
    index = index_of(
        table(
            reg("f", 5, endOffset=15),
            reg("gone", 5, offset=30),
            {"name": "gone", "type": "dir"},
            reg("g", 5, offset=20),
        )
    )
    assert [index.member(i)[:2] for i in range(index.member_count)] == [(10, 15), (20, 30)]


def test_identical_files_have_identical_keys_in_all_formats() -> None:
    data = hashlib.sha256(b"x").digest() * 300
    indexes: list[LayerIndex] = [
        index_of(write([file("f", data)], chunk_size=size))
        for write in (layers.estargz, layers.zstd_chunked)
        for size in (1000, 1 << 20)
    ]
    contents = [index.file(resolve(index, "f")) for index in indexes]
    assert {content.object_key for content in contents} == {hashlib.sha256(data).digest()}
    assert contents[0].partial_key == contents[2].partial_key
