# SPDX-License-Identifier: Apache-2.0
"""How many bytes of an eStargz blob hold the ranges of files that a start reads.

Written after the format's specification (stargz-snapshotter, docs/estargz.md), and not with lazysnap's
parsers, as lazysnap is to be measured by it.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

_FOOTER = 51
_TOC = "stargz.index.json"


def compressed_bytes(blob: bytes, reads: Iterable[Sequence[Any]]) -> int:
    """Sum of the sizes of the gzip members that hold the ranges, each counted once.

    Args:
        blob: An eStargz layer.
        reads: Path in the layer, offset and length in bytes; what follows does not matter.
    """
    # The footer is an empty gzip member whose extra field, after a header of 4 bytes, has the offset.
    toc_offset = int(blob[-_FOOTER + 16 : -_FOOTER + 32], 16)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob[toc_offset:-_FOOTER]))) as archive:
        toc = archive.extractfile(_TOC)
        assert toc is not None
        entries: list[dict[str, Any]] = json.load(toc)["entries"]
    chunks, links = _files(entries)
    begins = sorted({entry["offset"] for entry in entries if entry.get("offset")} | {toc_offset})
    sizes = {begin: end - begin for begin, end in pairwise(begins)}
    found = set()
    for path, offset, length, *_ in reads:
        name = path
        while name in links:
            name = links[name]
        for start, size, member in chunks.get(name, ()):
            if start < offset + length and offset < start + size:
                found.add(member)
    return sum(sizes[member] for member in found)


def _files(
    entries: Iterable[dict[str, Any]],
) -> tuple[dict[str, list[tuple[int, int, int]]], dict[str, str]]:
    """By name, the chunks of files (offset and size in the file, offset in the blob); hard links."""
    chunks: dict[str, list[tuple[int, int, int]]] = {}
    links: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for entry in entries:
        name = entry["name"].removeprefix("./").strip("/")
        if entry["type"] == "hardlink":
            links[name] = entry["linkName"].removeprefix("./").strip("/")
        elif entry["type"] in ("reg", "chunk") and "offset" in entry:
            sizes.setdefault(name, entry.get("size", 0))
            start = entry.get("chunkOffset", 0)
            # The last chunk has no size: it is what is left.
            size = entry.get("chunkSize") or sizes[name] - start
            chunks.setdefault(name, []).append((start, size, entry["offset"]))
    return chunks, links
