# SPDX-License-Identifier: Apache-2.0
"""eStargz and its ancestor stargz: footers and the TOC member.

Formats: stargz-snapshotter docs/estargz.md, and CRFS for stargz. A footer is an empty gzip member
whose Extra field names the TOC's offset; the TOC member holds a tar with one file, the JSON.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, NotLazy
from lazysnap.formats import gzip, tar
from lazysnap.formats.location import MAX_TOC_SIZE, Kind, TocLocation

if TYPE_CHECKING:
    from typing_extensions import Buffer

FOOTER_SIZE = 51
LEGACY_FOOTER_SIZE = 47
EXTERNAL_FOOTER_SIZE = 46
TOC_NAME = b"stargz.index.json"

_OFFSET = re.compile(rb"([0-9a-fA-F]{16})STARGZ")
_SUBFIELD = b"SG\x16\0"
_FILES = (tar.FILE, tar.OLD_FILE)
_EXTERNAL = b"SG\x11\0STARGZEXTERNALTOC"


def find(tail: bytes, blob_size: int, toc_digest: Digest | None) -> TocLocation | None:
    """Look for a footer at the end of a blob.

    Args:
        tail: the last bytes of the blob, 51 or more (or all of it).
        blob_size: in bytes.
        toc_digest: what the manifest promises of the JSON, if anything.

    Returns:
        None if there is no footer of these formats.

    Raises:
        NotLazy: reason `external-toc`: the TOC is in another image.
        FormatError: the footer points outside the blob, or the TOC is too large.
    """
    footers: tuple[tuple[int, Kind], ...] = (
        (FOOTER_SIZE, "estargz"),
        (LEGACY_FOOTER_SIZE, "stargz"),
    )
    for size, kind in footers:
        extra = _extra(tail, size)
        if kind == "estargz":
            if not extra.startswith(_SUBFIELD):
                continue
            extra = extra[len(_SUBFIELD) :]
        if match := _OFFSET.fullmatch(extra):
            return _location(int(match[1], 16), size, kind, blob_size, toc_digest)
    if _extra(tail, EXTERNAL_FOOTER_SIZE) == _EXTERNAL:
        raise NotLazy(
            "the table of contents of this eStargz layer is in another image",
            hint="convert the image without --estargz-external-toc",
            reason="external-toc",
        )
    return None


def _extra(tail: bytes, size: int) -> bytes:
    """The Extra field of the member that the last `size` bytes are; empty if they are none."""
    if len(tail) < size or not tail.startswith(gzip.MAGIC, len(tail) - size):
        return b""
    try:
        return gzip.parse_header(tail[-size:]).extra
    except FormatError:
        return b""


def _location(
    offset: int, footer_size: int, kind: Kind, blob_size: int, toc_digest: Digest | None
) -> TocLocation:
    length = blob_size - footer_size - offset
    if length <= 0:
        raise FormatError(f"{kind} footer names offset {offset} of a blob of {blob_size} bytes")
    if length > MAX_TOC_SIZE:
        raise FormatError(f"{kind} table of contents has {length} bytes, more than {MAX_TOC_SIZE}")
    return TocLocation(
        kind=kind,
        compression="gzip",
        blob_size=blob_size,
        offset=offset,
        length=length,
        uncompressed_length=None,
        data_end=offset,
        toc_digest=toc_digest,
    )


def extract(member: Buffer, limit: int) -> memoryview:
    """The JSON in a TOC member.

    Args:
        member: the compressed TOC.
        limit: the largest JSON accepted, in bytes; nothing behind it is decoded.

    Raises:
        FormatError: not a gzip member with a tar that begins with the TOC, or too large.
    """
    header = tar.parse_header(gzip.inflate(member, tar.BLOCK))
    if header is None or header.name != TOC_NAME or header.kind not in _FILES:
        name = b"" if header is None else header.name[:100]
        raise FormatError(f"table of contents begins with {name!r}, not {TOC_NAME!r}")
    if header.size > limit:
        raise FormatError(f"table of contents claims {header.size} bytes, more than {limit}")
    return memoryview(gzip.inflate(member, tar.BLOCK + header.size))[tar.BLOCK :]
