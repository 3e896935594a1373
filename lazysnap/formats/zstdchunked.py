# SPDX-License-Identifier: Apache-2.0
"""zstd:chunked: annotations, footers and the TOC frame, in both dialects.

One dialect is written by stargz-snapshotter and nerdctl, the other by containers/storage (podman,
buildah, skopeo; docs/containers-storage-zstd-chunked.md). Both put the TOC in a skippable frame
behind the data. They differ in the prefix of the annotations and in the footer, which
containers/storage never reads itself. Annotations are part of the manifest, so they win; a footer
that says something else is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lazysnap.digest import Digest
from lazysnap.errors import FormatError
from lazysnap.formats import zstd
from lazysnap.formats.location import MAX_TOC_SIZE, TocLocation

if TYPE_CHECKING:
    from typing_extensions import Buffer

PREFIXES = ("io.containers.zstd-chunked.", "io.github.containers.zstd-chunked.")
CHECKSUM = "manifest-checksum"
POSITION = "manifest-position"
# The largest footer, with the header of its skippable frame.
FOOTER_SIZE = 72

_POSITION = re.compile(r"([0-9]{1,19}):([0-9]{1,19}):([0-9]{1,19}):([0-9]{1,19})", re.ASCII)
_FIELDS = struct.Struct("<4Q")
_TYPE = 1
# Payload length, where the magic is in it, and the magic. The 56 bytes are of containers/storage
# 1.47 to 1.49, which wrote the magic in the wrong place.
_FOOTERS = (
    (64, 56, b"GNUlInUx"),
    (56, 32, b"GnUlInUx"),
    (40, 32, b"GnUlInUx"),
)


class Position(NamedTuple):
    """Where the TOC frame's content is."""

    offset: int
    length: int
    uncompressed_length: int
    type: int


def find(
    tail: bytes, blob_size: int, annotations: Mapping[str, str], toc_digest: Digest | None
) -> TocLocation | None:
    """Look for annotations, and for a footer at the end of a blob.

    Args:
        tail: the last bytes of the blob, 72 or more; may be empty if there are annotations.
        blob_size: in bytes.
        annotations: of the layer's descriptor.
        toc_digest: what the manifest promises of the JSON, if anything.

    Returns:
        None if there is neither.

    Raises:
        FormatError: they contradict each other, or point outside the blob.
    """
    annotated, checksum = _annotated(annotations)
    position = footer = _footer(tail)
    if annotated is not None:
        if footer is not None and footer != annotated:
            raise FormatError("zstd:chunked footer and annotations name different places")
        position = annotated
    if position is None:
        return None
    offset, length, uncompressed, kind = position
    header = zstd.SKIPPABLE_HEADER.size
    if kind != _TYPE:
        raise FormatError(f"zstd:chunked table of contents is of the unknown type {kind}")
    if offset < header or length <= 0 or offset + length > blob_size:
        raise FormatError(f"zstd:chunked table of contents at {offset}+{length} is not in the blob")
    if max(length, uncompressed) > MAX_TOC_SIZE:
        raise FormatError(f"zstd:chunked table of contents is larger than {MAX_TOC_SIZE} bytes")
    return TocLocation(
        kind="zstd:chunked",
        compression="zstd",
        blob_size=blob_size,
        offset=offset,
        length=length,
        uncompressed_length=uncompressed,
        data_end=offset - header,
        toc_digest=toc_digest,
        frame_digest=checksum,
    )


def _annotated(annotations: Mapping[str, str]) -> tuple[Position | None, Digest | None]:
    """What the annotations say: position and digest of the compressed TOC."""
    for prefix in PREFIXES:
        text = annotations.get(prefix + POSITION)
        if text is None:
            continue
        match = _POSITION.fullmatch(text)
        if match is None:
            raise FormatError(f"annotation {prefix}{POSITION} is not a position: {text[:100]!r}")
        checksum = annotations.get(prefix + CHECKSUM)
        position = Position(*(int(group) for group in match.groups()))
        return position, Digest.parse(checksum) if checksum else None
    return None, None


def _footer(tail: bytes) -> Position | None:
    """What the footer says, if there is one."""
    for length, magic_at, magic in _FOOTERS:
        frame = tail[-(length + zstd.SKIPPABLE_HEADER.size) :]
        if len(frame) != length + zstd.SKIPPABLE_HEADER.size:
            continue
        if zstd.SKIPPABLE_HEADER.unpack_from(frame) != (zstd.SKIPPABLE_MAGIC, length):
            continue
        payload = frame[zstd.SKIPPABLE_HEADER.size :]
        if payload.startswith(magic, magic_at):
            return Position(*_FIELDS.unpack_from(payload))
    return None


def extract(frame: Buffer, uncompressed_length: int, limit: int) -> bytes:
    """The JSON in a TOC frame.

    Args:
        frame: the compressed TOC, without the header of the skippable frame.
        uncompressed_length: of the JSON, in bytes.
        limit: the largest JSON accepted, in bytes.

    Raises:
        FormatError: not zstd, of another length, or too large.
    """
    if uncompressed_length > limit:
        raise FormatError(f"table of contents claims {uncompressed_length} bytes, limit {limit}")
    return zstd.inflate(frame, uncompressed_length)
