# SPDX-License-Identifier: Apache-2.0
"""Where a layer's table of contents (TOC) is, and what checks it.

The result of looking at a blob's tail and annotations; the same for every format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lazysnap.digest import Digest

Kind = Literal["estargz", "stargz", "zstd:chunked"]
Compression = Literal["gzip", "zstd"]

# The limit that containers/storage sets for TOCs.
MAX_TOC_SIZE = 150 << 20

TOC_DIGEST_ANNOTATION = "containerd.io/snapshot/stargz/toc.digest"

CONVERT_HINT = (
    "convert the image with `nerdctl image convert --estargz --oci` or"
    " `ctr-remote images convert --estargz --oci`"
)
"""What users can do about a layer that would be lazy in another form."""


@dataclass(frozen=True, slots=True)
class TocLocation:
    """A TOC that is known to be there, but neither read nor checked.

    Attributes:
        kind: the format of the layer.
        compression: of the payloads and of the TOC.
        blob_size: of the whole layer blob, in bytes.
        offset: of the compressed TOC's first byte in the blob.
        length: of the compressed TOC, in bytes.
        uncompressed_length: of the TOC's JSON, where the format tells it.
        data_end: blob offset where the payloads end.
        toc_digest: promised for the uncompressed JSON, if anything is.
        frame_digest: promised for the compressed TOC, if anything is.
    """

    kind: Kind
    compression: Compression
    blob_size: int
    offset: int
    length: int
    uncompressed_length: int | None
    data_end: int
    toc_digest: Digest | None = None
    frame_digest: Digest | None = None

    @property
    def end(self) -> int:
        """Blob offset behind the compressed TOC."""
        return self.offset + self.length
