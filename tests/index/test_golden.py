# SPDX-License-Identifier: Apache-2.0
"""Indexes of layers by foreign tools, against what containerd unpacked (fixtures/layers/README.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lazysnap.errors import DigestMismatch
from lazysnap.index.dump import dump
from lazysnap.index.reader import LayerIndex
from tests.support.indexes import index_of, read, resolve
from tests.support.layers import Layer

GOLDEN = Path(__file__).parents[2] / "fixtures" / "layers"
BLOBS = [path.with_suffix("") for path in sorted(GOLDEN.glob("*.json"))]


def golden(path: Path) -> Layer:
    annotations = json.loads(path.with_name(path.name + ".json").read_text())
    compression = "gzip" if path.suffix == ".estargz" else "zstd"
    return Layer(path.read_bytes(), f"application/x+{compression}", annotations, b"")


def comparable(lines: list[str]) -> list[str]:
    """Without the times that only unpacking sets, and without what an unpacked tree cannot show."""
    found = []
    for line in lines:
        if "mtime=now" in line or " implied" in line or " whiteout" in line or line[:2] == "/ ":
            line = re.sub(r"mtime=\w+", "mtime=now", line)
        found.append(line.replace(" implied", ""))
    return found


@pytest.fixture(params=BLOBS, ids=lambda path: path.name)
def layer(request: pytest.FixtureRequest) -> tuple[Layer, list[str]]:
    path: Path = request.param
    return golden(path), path.with_name(path.name + ".txt").read_text().splitlines()


def test_there_are_golden_layers() -> None:
    assert len(BLOBS) == 7


def test_the_tree_is_what_containerd_unpacks(layer: tuple[Layer, list[str]]) -> None:
    blob, unpacked = layer
    assert comparable(list(dump(index_of(blob)))) == comparable(unpacked)


def test_every_file_reads_back(layer: tuple[Layer, list[str]]) -> None:
    blob, _ = layer
    index = index_of(blob)
    total = 0
    for number in range(index.chunk_count):
        node = index.owner(number)
        if index.file(node).first_chunk == number:
            data = read(index, blob.blob, node)
            total += len(data)
            name = index.file(node).name
            found = index.find(name)
            assert index.file(found).name == name
            assert read(index, blob.blob, found) == data
    assert total == index.total_size > 0
    assert index.find(bytes(32)) == index.find(b"\xff" * 32) == -1


def test_annotations_are_what_is_checked(layer: tuple[Layer, list[str]]) -> None:
    blob, _ = layer
    for key, value in list(blob.annotations.items()):
        if not key.endswith(("digest", "checksum")):
            continue
        blob.annotations[key] = value[:-4] + "0000"
        with pytest.raises(DigestMismatch):
            index_of(blob)
        blob.annotations[key] = value


@pytest.fixture
def index(request: pytest.FixtureRequest) -> LayerIndex:
    return index_of(golden(GOLDEN / request.param))


@pytest.mark.parametrize("index", ["base.estargz", "base.stargz-zstd"], indirect=True)
def test_landmark(index: LayerIndex) -> None:
    """What is to be fetched first: exactly the two files that were asked for."""
    assert index.prefetch_end is not None
    first = {
        index.path(index.owner(number))
        for number in range(index.chunk_count)
        if index.member(index.chunk(number).member).blob_offset < index.prefetch_end
    }
    assert first <= {b"/bin/tool", b"/bin/again", b"/share/small"}
    assert b"/share/small" in first
    assert resolve(index, ".prefetch.landmark") == -1


@pytest.mark.parametrize("index", ["upper.estargz"], indirect=True)
def test_no_prefetch_landmark(index: LayerIndex) -> None:
    assert index.prefetch_end == 0
    assert resolve(index, ".no.prefetch.landmark") == -1


@pytest.mark.parametrize("index", ["base.containers-zstd"], indirect=True)
def test_zeros_and_content_defined_chunks(index: LayerIndex) -> None:
    assert index.prefetch_end is None
    content = index.file(resolve(index, "share/large"))
    numbers = range(content.first_chunk, content.first_chunk + content.chunk_count)
    chunks = [index.chunk(number) for number in numbers]
    assert [chunk.size for chunk in chunks if chunk.member < 0] == [80_000]
    assert len({chunk.size for chunk in chunks}) > 3
    assert content.partial_key is not None
