# SPDX-License-Identifier: Apache-2.0
"""Indexes that are wrong though their checksums are right: errors of ours, and in bounded time."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from lazysnap.erofs.image import build
from lazysnap.errors import FormatError
from lazysnap.index import layout
from lazysnap.index.build import build as make
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex
from tests.support import layers
from tests.support.indexes import toc_of
from tests.support.layers import directory, file, hardlink, opaque, symlink

DATA = encode(
    make(
        toc_of(
            layers.zstd_chunked(
                [
                    directory("a/b/c"),
                    *[file(f"a/{i}", b"%d" % i * 200, xattrs={"user.n": b"1"}) for i in range(9)],
                    hardlink("a/b/link", "a/7"),
                    symlink("a/b/c/l", "d/7"),
                    opaque("x/y"),
                ],
                dialect="containers",
                chunk_size=250,
            )
        )
    )
)


def forge(*changes: tuple[int, bytes]) -> LayerIndex:
    """The index with other bytes at these positions."""
    forged = bytearray(DATA)
    for position, value in changes:
        forged[position : position + len(value)] = value
    checksum = isal_zlib.crc32(memoryview(forged)[layout.CHECKED_FROM :])
    struct.pack_into("<I", forged, 12, checksum)
    return LayerIndex(bytes(forged))


def section(number: int) -> int:
    """Where a section begins."""
    table = layout.PREAMBLE.size + layout.FACTS.size
    offset: int = layout.SECTION.unpack_from(DATA, table + number * layout.SECTION.size)[0]
    return offset


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.tuples(st.integers(24, len(DATA) - 4), st.sampled_from([0, 1, 7, 2**31, 2**32 - 1])),
        min_size=1,
        max_size=6,
    )
)
def test_anything(changes: list[tuple[int, int]]) -> None:
    try:
        build(forge(*((position, struct.pack("<I", value)) for position, value in changes)))
    except FormatError:
        return


def test_directories_that_go_round_in_a_circle() -> None:
    at = section(layout.DIRENTS)
    for number in range((section(layout.IMPLIED_NODES) - at) // layout.DIRENT_SIZE):
        place = at + number * layout.DIRENT_SIZE
        offset, length, node, parent = layout.DIRENT.unpack_from(DATA, place)
        if node == 2 or parent > 2:
            continue
        with pytest.raises(FormatError):
            build(forge((place, layout.DIRENT.pack(offset, length, 0, parent))))


def test_directories_that_share_names() -> None:
    index = LayerIndex(DATA)
    everything = struct.pack("<II", 0, index.dirent_count)
    places = [
        (section(layout.NODES) + node * layout.NODE_SIZE + layout.PLACE_AT, everything)
        for node in (0, 1)
    ]
    with pytest.raises(FormatError):
        build(forge(*places))


@pytest.mark.parametrize("name", [b"/", b"\0", b"."])
def test_names_that_no_file_can_have(name: bytes) -> None:
    at = section(layout.DIRENTS)
    offset = layout.DIRENT.unpack_from(DATA, at)[0]
    with pytest.raises(FormatError):
        build(forge((section(layout.TEXT) + offset, name)))
