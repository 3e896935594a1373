# SPDX-License-Identifier: Apache-2.0
"""The stored form: stable, mapped, and safe to open whatever it holds."""

from __future__ import annotations

import contextlib
import mmap
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from lazysnap.errors import FormatError, InvalidArgument, LazysnapError
from lazysnap.index import layout
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.dump import dump
from lazysnap.index.reader import LayerIndex
from tests.support import layers
from tests.support.indexes import index_of, resolve, toc_of
from tests.support.layers import directory, file, hardlink, opaque, symlink

LAYER = layers.zstd_chunked(
    [
        directory("./"),
        directory("d"),
        *[file(f"d/{i}", b"%d" % i * 200, xattrs={"user.n": b"%d" % i}) for i in range(20)],
        hardlink("d/link", "d/7"),
        symlink("l", "d/7"),
        opaque("x/y"),
    ],
    dialect="containers",
    chunk_size=250,
)
DATA = encode(build(toc_of(LAYER)))


def test_the_same_layer_gives_the_same_bytes() -> None:
    assert encode(build(toc_of(LAYER))) == DATA


def test_facts() -> None:
    index = LayerIndex(DATA)
    assert (index.kind, index.compression, index.verified) == ("zstd:chunked", "zstd", True)
    assert (index.blob_size, index.toc_offset) == (LAYER.size, LAYER.toc_offset)
    assert index.data_end == LAYER.toc_offset - 8
    assert index.toc_digest == LAYER.toc_digest
    assert index.total_size == sum(len(b"%d" % i) * 200 for i in range(20))
    assert index.prefetch_end is None


def test_mapped(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(DATA)
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    index = LayerIndex(mapped)
    assert list(dump(index)) == list(dump(LayerIndex(DATA)))
    mapped.close()  # nothing in the index keeps it open


@pytest.mark.parametrize("convert", [bytearray, memoryview])
def test_other_buffers(convert: type) -> None:
    assert list(dump(LayerIndex(convert(DATA)))) == list(dump(LayerIndex(DATA)))


def test_names() -> None:
    index = LayerIndex(DATA)
    parent = resolve(index, "d")
    names = [name for _, name, _ in index.children(parent)]
    assert names == sorted(names)
    assert len(names) == index.child_count(parent) == 21
    for position, name, node in index.children(parent):
        assert index.lookup(parent, name) == node
        assert index.lookup(parent, name + b"x") == -1
        assert next(index.children(parent, position)) == (position, name, node)
        assert index.path(node).startswith(b"/d/")
        assert index.parent(node) == parent
    assert list(index.children(parent, 21)) == []
    assert index.lookup(resolve(index, "d/1"), b"x") == -1
    assert index.lookup(0, b"") == -1
    assert (index.path(0), index.parent(0)) == (b"/", 0)
    assert resolve(index, "d/link") == resolve(index, "d/7")


def test_wrong_arguments() -> None:
    index = LayerIndex(DATA)
    for call in (index.attributes, index.file, index.xattrs, index.child_count, index.readlink):
        for node in (-1, index.node_count):
            with pytest.raises(InvalidArgument):
                call(node)
    for number in (-1, index.chunk_count):
        with pytest.raises(InvalidArgument):
            index.chunk(number)
        with pytest.raises(InvalidArgument):
            index.owner(number)
    for number in (-1, index.member_count):
        with pytest.raises(InvalidArgument):
            index.member_chunks(number)
    with pytest.raises(InvalidArgument):
        index.file(0)
    with pytest.raises(InvalidArgument):
        index.readlink(0)


@settings(deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@example(0, 1)
@example(8, 1)
@example(12, 1)
@example(16, 1)
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= change
    with pytest.raises(FormatError) as caught:
        LayerIndex(bytes(damaged))
    assert caught.value.reason == "bad-index"


@pytest.mark.parametrize("length", [0, 1, 23, 24, 100, 500, len(DATA) - 1])
def test_any_truncation_is_noticed(length: int) -> None:
    with pytest.raises(FormatError):
        LayerIndex(DATA[:length])
    with pytest.raises(FormatError):
        LayerIndex(DATA + b"\0")


def visit(index: LayerIndex) -> None:
    """Call everything with every number there is."""
    for node in range(index.node_count):
        mode = index.attributes(node).mode
        attempt(index.xattrs, node)
        attempt(index.path, node)
        attempt(lambda number: list(index.children(number)), node)
        attempt(lambda number: index.lookup(number, b"7"), node)
        if stat.S_ISREG(mode):
            attempt(index.file, node)
            attempt(lambda number: index.chunk_at(number, 100), node)
            attempt(lambda number: index.find(index.file(number).name), node)
        if stat.S_ISLNK(mode):
            attempt(index.readlink, node)
    for number in range(index.chunk_count):
        index.chunk(number)
    for number in range(index.member_count):
        attempt(index.member_chunks, number)
    attempt(lambda _: list(index.implied()), 0)


def attempt(call: Callable[[int], object], number: int) -> None:
    with contextlib.suppress(LazysnapError):
        call(number)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(24, len(DATA) - 4), st.sampled_from([0, 1, 7, 2**31, 2**32 - 1])),
        min_size=1,
        max_size=6,
    )
)
def test_forged_indexes_give_our_errors_only(changes: list[tuple[int, int]]) -> None:
    """With a right checksum and wrong contents: nothing crashes, and nothing runs for long."""
    forged = bytearray(DATA)
    for position, value in changes:
        struct.pack_into("<I", forged, position, value)
    checksum = isal_zlib.crc32(memoryview(forged)[layout.CHECKED_FROM :])
    struct.pack_into("<I", forged, 12, checksum)
    try:
        index = LayerIndex(bytes(forged))
    except FormatError:
        return
    visit(index)


def test_dump_of_an_empty_layer() -> None:
    assert list(dump(index_of(layers.estargz([])))) == ["/ dir 0755 0:0 nlink=2 mtime=0"]
