# SPDX-License-Identifier: Apache-2.0
"""From a written layer to its index, and back to the files' bytes: what the engine does, in short."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from lazysnap.formats.identify import FOOTER_SIZE, identify, inflate_payload
from lazysnap.formats.verify import VerifiedToc, trust_unverified_toc, verify_toc
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.model import Chunk
from lazysnap.index.reader import LayerIndex
from tests.support.layers import Layer


def toc_of(layer: Layer, *, trust: bool = False) -> VerifiedToc:
    """The table of contents of a layer, found from the blob's tail."""
    tail = layer.blob[-FOOTER_SIZE:]
    location = identify(tail, layer.size, layer.annotations, layer.media_type)
    compressed = layer.blob[location.offset : location.end]
    return (trust_unverified_toc if trust else verify_toc)(location, compressed)


def index_of(layer: Layer, *, trust: bool = False) -> LayerIndex:
    """The index of a layer."""
    return LayerIndex(encode(build(toc_of(layer, trust=trust))))


class Counting(LayerIndex):
    """An index that counts how often it is asked: the files and the chunks that somebody looks at."""

    looks = 0

    def chunk(self, number: int) -> Chunk:
        self.looks += 1
        return super().chunk(number)

    def name(self, node: int) -> bytes:
        self.looks += 1
        return super().name(node)

    def children(self, node: int, start: int = 0) -> Iterator[tuple[int, bytes, int]]:
        for child in super().children(node, start):
            self.looks += 1
            yield child


def counting(layer: Layer) -> Counting:
    """The index of a layer, which counts."""
    return Counting(encode(build(toc_of(layer))))


def resolve(index: LayerIndex, path: str) -> int:
    """The node at a path, or -1."""
    node = 0
    for part in path.strip("/").split("/"):
        node = index.lookup(node, part.encode())
        if node < 0:
            break
    return node


def read(index: LayerIndex, blob: bytes, node: int) -> bytes:
    """The bytes of a regular file, each chunk checked."""
    content = index.file(node)
    parts = []
    for number in range(content.first_chunk, content.first_chunk + content.chunk_count):
        chunk = index.chunk(number)
        assert chunk.node == index.owner(number) == node
        if chunk.member < 0:
            parts.append(bytes(chunk.size))
            continue
        member = index.member(chunk.member)
        assert number in index.member_chunks(chunk.member)
        data = inflate_payload(
            index.compression,
            blob[member.blob_offset : member.blob_end],
            chunk.inner_offset + chunk.size,
        )[chunk.inner_offset :]
        if chunk.digest is not None:
            assert hashlib.sha256(data).digest() == chunk.digest
        parts.append(data)
    data = b"".join(parts)
    assert len(data) == content.size
    return data
