# SPDX-License-Identifier: Apache-2.0
"""Which lazy format a layer has, and where its table of contents is.

The one place that knows all formats; a new one is a module beside this and a line here. Looks at
bytes and annotations only: the media type tells the compression of a tar, never whether there is a
table of contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, NotLazy
from lazysnap.formats import gzip, stargz, zstd, zstdchunked
from lazysnap.formats.location import CONVERT_HINT, MAX_TOC_SIZE, TOC_DIGEST_ANNOTATION, TocLocation

if TYPE_CHECKING:
    from typing_extensions import Buffer

# So many of a blob's last bytes are enough to identify every format.
FOOTER_SIZE = max(stargz.FOOTER_SIZE, zstdchunked.FOOTER_SIZE)


def identify(
    tail: bytes, blob_size: int, annotations: Mapping[str, str], media_type: str = ""
) -> TocLocation:
    """Find the table of contents of a layer.

    Args:
        tail: the blob's last bytes, `FOOTER_SIZE` or more (all of a smaller blob). It need not
            hold the table of contents: get the bytes from `offset` to `end` of the result next.
        blob_size: in bytes.
        annotations: of the layer's descriptor, or labels with the same names.
        media_type: of the layer's descriptor; may be empty.

    Raises:
        NotLazy: an ordinary layer (`no-toc`), one with an external table of contents
            (`external-toc`) or an encrypted one (`encrypted`).
        FormatError: the layer contradicts itself.
    """
    if len(tail) > blob_size:
        raise FormatError(f"{len(tail)} bytes are not the tail of a blob of {blob_size} bytes")
    if media_type.endswith("+encrypted"):
        raise NotLazy("the layer is encrypted", reason="encrypted")
    text = annotations.get(TOC_DIGEST_ANNOTATION)
    toc_digest = Digest.parse(text) if text else None
    location = stargz.find(tail, blob_size, toc_digest)
    if location is None:
        location = zstdchunked.find(tail, blob_size, annotations, toc_digest)
    if location is None:
        raise NotLazy(
            f"the layer ({media_type or 'of unknown media type'}) has no table of contents",
            hint=CONVERT_HINT,
            reason="no-toc",
        )
    return location


def extract_toc(location: TocLocation, compressed: Buffer, limit: int = MAX_TOC_SIZE) -> Buffer:
    """Decompress a table of contents; its digest is not checked here.

    Args:
        location: from `identify`.
        compressed: the blob's bytes from `location.offset` to `location.end`, or more.
        limit: the largest JSON accepted, in bytes.

    Returns:
        The JSON.

    Raises:
        FormatError: the bytes are not what the location promises, or too large.
    """
    content = compressed_toc(location, compressed)
    if location.compression == "gzip":
        return stargz.extract(content, limit)
    return zstdchunked.extract(content, location.uncompressed_length or 0, limit)


def compressed_toc(location: TocLocation, data: Buffer) -> memoryview:
    """Exactly the compressed table of contents, from bytes that begin with it."""
    view = memoryview(data).cast("B")
    if len(view) < location.length:
        raise FormatError(f"table of contents is cut off: {len(view)} of {location.length} bytes")
    return view[: location.length]


def inflate_payload(compression: str, data: Buffer, size: int) -> bytes:
    """Decode the first `size` bytes of a member of a layer, which `data` begins with.

    Args:
        compression: `gzip` or `zstd`, as in `TocLocation`.
        data: the member, or enough of its beginning.
        size: how many decoded bytes are wanted.

    Raises:
        FormatError: damaged, or holds fewer bytes.
    """
    return gzip.inflate(data, size) if compression == "gzip" else zstd.inflate(data, size)
