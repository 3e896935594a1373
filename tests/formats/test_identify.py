# SPDX-License-Identifier: Apache-2.0
"""Which format a blob has, and where its table of contents is."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazysnap.errors import FormatError, LazysnapError, NotLazy
from lazysnap.formats.identify import FOOTER_SIZE, extract_toc, identify
from tests.support import layers
from tests.support.layers import Layer, directory, file

GOLDEN = Path(__file__).parents[2] / "fixtures" / "layers"
ENTRIES = [directory("d"), file("d/f", b"data" * 1000)]


def variants() -> dict[str, Layer]:
    return {
        "estargz": layers.estargz(ENTRIES),
        "stargz": layers.estargz(ENTRIES, legacy=True),
        "stargz-40": layers.zstd_chunked(ENTRIES),
        "containers-64": layers.zstd_chunked(ENTRIES, dialect="containers"),
        "containers-56": layers.zstd_chunked(ENTRIES, dialect="containers", footer=56),
        "containers-40": layers.zstd_chunked(ENTRIES, dialect="containers", footer=40),
    }


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("known", ["footer", "both"])
def test_finds_the_table_of_contents(name: str, known: str) -> None:
    layer = variants()[name]
    annotations = layer.annotations if known == "both" else {}
    location = identify(layer.blob[-FOOTER_SIZE:], layer.size, annotations, layer.media_type)
    assert location.offset == layer.toc_offset
    assert location.blob_size == layer.size
    assert location.kind == (name if "stargz" in name and "-" not in name else "zstd:chunked")
    assert layer.media_type.endswith(location.compression)
    assert extract_toc(location, layer.blob[location.offset : location.end]) == layer.toc
    # More than asked for is as good.
    assert extract_toc(location, layer.blob[location.offset :]) == layer.toc


@pytest.mark.parametrize("name", ["stargz-40", "containers-64", "containers-40"])
def test_annotations_alone_are_enough_for_zstd_chunked(name: str) -> None:
    layer = variants()[name]
    location = identify(b"", layer.size, layer.annotations)
    assert extract_toc(location, layer.blob[location.offset : location.end]) == layer.toc
    assert location.frame_digest is not None


def test_footer_and_annotations_must_agree() -> None:
    layer = layers.zstd_chunked(ENTRIES)
    key = layers.STARGZ_PREFIX + "manifest-position"
    offset, rest = layer.annotations[key].split(":", 1)
    layer.annotations[key] = f"{int(offset) + 1}:{rest}"
    with pytest.raises(FormatError, match="different places"):
        identify(layer.blob, layer.size, layer.annotations)


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_ordinary_layers_are_not_lazy(compression: str) -> None:
    layer = layers.plain(ENTRIES, compression)
    with pytest.raises(NotLazy) as caught:
        identify(layer.blob[-FOOTER_SIZE:], layer.size, {}, layer.media_type)
    assert caught.value.reason == "no-toc"


@pytest.mark.parametrize("blob", [b"", b"x", bytes(46), bytes(72)])
def test_tiny_blobs_are_not_lazy(blob: bytes) -> None:
    with pytest.raises(NotLazy):
        identify(blob, len(blob), {})


def test_external_table_of_contents() -> None:
    extra = b"SG\x11\0STARGZEXTERNALTOC"
    footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\0\0\xff\xff" + bytes(8)
    assert len(footer) == 46
    assert gzip.decompress(footer) == b""
    blob = layers.plain(ENTRIES).blob + footer
    with pytest.raises(NotLazy) as caught:
        identify(blob[-FOOTER_SIZE:], len(blob), {})
    assert caught.value.reason == "external-toc"


def test_encrypted() -> None:
    with pytest.raises(NotLazy) as caught:
        identify(bytes(72), 100, {}, layers.TAR + "+gzip+encrypted")
    assert caught.value.reason == "encrypted"


def test_footer_in_upper_case() -> None:
    layer = layers.estargz([file("f", bytes(range(256)) * 99)])
    head, footer = layer.blob[:-51], layer.blob[-51:]
    digits = footer[16:32].upper()
    location = identify(footer[:16] + digits + footer[32:], len(head) + 51, {})
    assert location.offset == layer.toc_offset


@pytest.mark.parametrize("offset", [2**64 - 1, 10_000, 949])
def test_estargz_footer_that_points_nowhere(offset: int) -> None:
    blob = bytes(949) + layers.estargz_footer(offset)
    with pytest.raises(FormatError):
        identify(blob, len(blob), {})


@pytest.mark.parametrize(
    "position",
    ["", "1:2", "a:b:c:d", "8:0:1:1", "7:1:1:1", "8:99999:1:1", "8:10:10:2", "8:10:157286401:1"],
)
def test_positions_that_cannot_be(position: str) -> None:
    annotations = {layers.STARGZ_PREFIX + "manifest-position": position}
    with pytest.raises(FormatError):
        identify(b"", 1000, annotations)


def test_too_large_tables_of_contents() -> None:
    with pytest.raises(FormatError, match="more than"):
        identify(layers.estargz_footer(100), 200 << 20, {})


def test_a_table_of_contents_may_not_grow_beyond_the_limit() -> None:
    for layer in variants().values():
        location = identify(layer.blob[-FOOTER_SIZE:], layer.size, {})
        with pytest.raises(FormatError, match="claims"):
            extract_toc(location, layer.blob[location.offset :], limit=len(layer.toc) - 1)


def test_cut_table_of_contents() -> None:
    for layer in variants().values():
        location = identify(layer.blob[-FOOTER_SIZE:], layer.size, {})
        with pytest.raises(FormatError, match="cut off"):
            extract_toc(location, layer.blob[location.offset : location.end - 1])


@pytest.mark.parametrize("blob", sorted(GOLDEN.glob("*stargz*.json")), ids=lambda p: p.stem)
def test_footers_by_foreign_tools(blob: Path) -> None:
    data = blob.with_suffix("").read_bytes()
    location = identify(data[-FOOTER_SIZE:], len(data), {})
    toc = json.loads(bytes(extract_toc(location, data[location.offset : location.end])))
    assert toc["version"] == 1


@given(st.binary(max_size=100), st.integers(0, 200), st.integers(0, 71), st.integers(0, 255))
def test_damaged_tails_give_our_errors_only(
    junk: bytes, more: int, position: int, byte: int
) -> None:
    for tail in (junk, *(layer.blob[-FOOTER_SIZE:] for layer in VARIANTS)):
        damaged = bytearray(tail)
        if position < len(damaged):
            damaged[position] = byte
        try:
            location = identify(bytes(damaged), len(damaged) + more, {})
            extract_toc(location, bytes(damaged))
        except LazysnapError:
            pass


VARIANTS = list(variants().values())
