# SPDX-License-Identifier: Apache-2.0
"""No table of contents without a digest check, or an explicit decision to do without."""

from __future__ import annotations

import dataclasses
import gzip
import io
import tarfile
import tracemalloc

import pytest

from lazysnap.digest import Digest
from lazysnap.errors import DigestMismatch, FormatError, NotLazy
from lazysnap.formats.identify import FOOTER_SIZE, identify
from lazysnap.formats.location import TocLocation
from lazysnap.formats.verify import VerifiedToc, trust_unverified_toc, verify_toc
from tests.support import layers
from tests.support.layers import Layer, file

ENTRIES = [file("f", b"data")]
WRONG = Digest.of(b"something else")


def locate(layer: Layer, *, annotated: bool = True) -> tuple[TocLocation, bytes]:
    annotations = layer.annotations if annotated else {}
    location = identify(layer.blob[-FOOTER_SIZE:], layer.size, annotations)
    return location, layer.blob[location.offset : location.end]


@pytest.mark.parametrize("make", [layers.estargz, layers.zstd_chunked])
def test_annotated_digests(make: object) -> None:
    layer = make(ENTRIES)  # type: ignore[operator]  # two writers with the same first argument
    location, compressed = locate(layer)
    toc = verify_toc(location, compressed)
    assert toc.verified
    assert toc.json == layer.toc
    assert toc.digest == layer.toc_digest
    with pytest.raises(DigestMismatch):
        verify_toc(dataclasses.replace(location, toc_digest=WRONG), compressed)
    with pytest.raises(DigestMismatch):
        verify_toc(location, compressed, expected=WRONG)


def test_containers_dialect_has_a_digest_of_the_compressed_form_only() -> None:
    layer = layers.zstd_chunked(ENTRIES, dialect="containers")
    location, compressed = locate(layer)
    assert location.toc_digest is None
    assert verify_toc(location, compressed).verified
    with pytest.raises(DigestMismatch, match="compressed"):
        verify_toc(dataclasses.replace(location, frame_digest=WRONG), compressed)


def test_the_compressed_form_is_checked_before_it_is_decoded() -> None:
    location, compressed = locate(layers.zstd_chunked(ENTRIES))
    with pytest.raises(DigestMismatch, match="compressed"):
        verify_toc(location, b"x" + compressed[1:])


def test_a_label_is_enough() -> None:
    layer = layers.estargz(ENTRIES)
    location, compressed = locate(layer, annotated=False)
    assert verify_toc(location, compressed, expected=Digest.parse(layer.toc_digest)).verified


def test_other_algorithms() -> None:
    layer = layers.estargz(ENTRIES)
    location, compressed = locate(layer, annotated=False)
    hasher = Digest("sha512:").hasher()
    hasher.update(layer.toc)
    assert verify_toc(location, compressed, expected=Digest.from_hash(hasher)).verified


def test_nothing_promised_is_refused_unless_trusted_by_name() -> None:
    layer = layers.estargz(ENTRIES, legacy=True)
    location, compressed = locate(layer)
    with pytest.raises(NotLazy) as caught:
        verify_toc(location, compressed)
    assert caught.value.reason == "unverified-toc"
    assert not trust_unverified_toc(location, compressed).verified


def test_there_is_no_other_way() -> None:
    location, compressed = locate(layers.estargz(ENTRIES))
    toc = verify_toc(location, compressed)
    with pytest.raises(TypeError):
        VerifiedToc(object(), location, toc.json, toc.digest, verified=True)


def packed_tar(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(min(size, 1 << 20))


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        bytes(512),
        packed_tar("other.json", 10),
        packed_tar("stargz.index.json", 10, tarfile.DIRTYPE),
        packed_tar("stargz.index.json", 2 << 20),
        packed_tar("stargz.index.json", 1 << 40),
    ],
    ids=["short", "zeros", "name", "directory", "cut", "huge"],
)
def test_wrong_tars(content: bytes) -> None:
    member = gzip.compress(content)
    blob = member + layers.estargz_footer(0)
    location = identify(blob[-FOOTER_SIZE:], len(blob), {})
    with pytest.raises(FormatError):
        trust_unverified_toc(location, member)


def test_gzip_bomb() -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as out:
        out.write(packed_tar("stargz.index.json", 151 << 20))
        for _ in range(300):
            out.write(bytes(1 << 20))
    blob = packed.getvalue() + layers.estargz_footer(0)
    location = identify(blob[-FOOTER_SIZE:], len(blob), {})
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="claims"):
            trust_unverified_toc(location, blob)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
