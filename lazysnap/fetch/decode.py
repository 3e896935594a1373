# SPDX-License-Identifier: Apache-2.0
"""From compressed members to verified chunks in the cache; what a decoding thread does.

Each chunk is compared with its digest before it is stored or handed on. A chunk that cannot be stored
(full disk) is handed on in memory, so that a reader gets its bytes all the same. Runs in threads and
holds no state of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lazysnap.errors import DigestMismatch
from lazysnap.formats.identify import inflate_payload
from lazysnap.index.model import Chunk
from lazysnap.index.reader import LayerIndex

Store = Callable[[int, Chunk, memoryview], bool]


@dataclass(slots=True)
class Decoded:
    """The outcome of a batch of members.

    Attributes:
        unstored: chunk number to bytes, for what the cache could not take.
        size: how many decoded bytes were verified.
    """

    unstored: dict[int, bytes] = field(default_factory=dict)
    size: int = 0


def decode_members(
    index: LayerIndex, members: Sequence[int], data: memoryview, base: int, store: Store
) -> Decoded:
    """Decode, verify and store the chunks of some members.

    Args:
        index: of the layer.
        members: numbers of the members, all of which lie in `data`.
        data: compressed bytes of the blob.
        base: blob offset of `data`'s first byte.
        store: puts a verified chunk into the cache; False if it could not.

    Raises:
        DigestMismatch: a chunk is not what the table of contents promises.
        FormatError: a member cannot be decoded.
    """
    decoded = Decoded()
    for number in members:
        member = index.member(number)
        chunks = [(i, index.chunk(i)) for i in index.member_chunks(number)]
        need = max(chunk.inner_offset + chunk.size for _, chunk in chunks)
        compressed = data[member.blob_offset - base : member.blob_end - base]
        plain = memoryview(inflate_payload(index.compression, compressed, need))
        for i, chunk in chunks:
            content = plain[chunk.inner_offset : chunk.inner_offset + chunk.size]
            if chunk.digest is not None and hashlib.sha256(content).digest() != chunk.digest:
                raise DigestMismatch(
                    f"chunk at blob offset {member.blob_offset} of {_where(index, chunk)} "
                    "is not what the table of contents promises",
                    hint="the registry or its storage serves wrong bytes",
                )
            decoded.size += chunk.size
            if not store(i, chunk, content):
                decoded.unstored[i] = bytes(content)
    return decoded


def _where(index: LayerIndex, chunk: Chunk) -> str:
    return "/" + index.path(chunk.node).decode("utf-8", "backslashreplace")
