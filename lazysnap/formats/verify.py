# SPDX-License-Identifier: Apache-2.0
"""The only two ways to a `VerifiedToc`: a digest check, or the open admission that there is none.

An index is built from nothing else, so that no code path can forget the check.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, final

from lazysnap.digest import Digest
from lazysnap.errors import NotLazy
from lazysnap.formats.identify import compressed_toc, extract_toc
from lazysnap.formats.location import CONVERT_HINT, TocLocation

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SEAL = object()


@final
class VerifiedToc:
    """A table of contents; made by `verify_toc` and `trust_unverified_toc` only.

    Attributes:
        location: where it came from.
        json: uncompressed.
        digest: sha256 of `json`.
        verified: whether a digest was checked; if not, files without chunk digests are accepted.
    """

    __slots__ = ("digest", "json", "location", "verified")

    def __init__(
        self, seal: object, location: TocLocation, json: Buffer, digest: Digest, *, verified: bool
    ) -> None:
        if seal is not _SEAL:
            raise TypeError("use verify_toc() or trust_unverified_toc()")
        self.location = location
        self.json = json
        self.digest = digest
        self.verified = verified


def verify_toc(
    location: TocLocation, compressed: Buffer, *, expected: Digest | None = None
) -> VerifiedToc:
    """Decompress a table of contents and check it against everything that was promised of it.

    The compressed form is checked before it is decoded, where there is a digest of it.

    Args:
        location: from `identify`; its digests come from the manifest.
        compressed: the blob's bytes from `location.offset` to `location.end`, or more.
        expected: digest of the JSON that came another way, such as a snapshot label.

    Raises:
        DigestMismatch: it is not what was promised.
        NotLazy: reason `unverified-toc`: nothing was promised.
        FormatError: the bytes are no table of contents.
    """
    promised = [digest for digest in (expected, location.toc_digest) if digest is not None]
    if not promised and location.frame_digest is None:
        raise NotLazy(
            "the manifest has no digest of the layer's table of contents",
            hint=f"{CONVERT_HINT}; or allow layers that cannot be verified",
            reason="unverified-toc",
        )
    if location.frame_digest is not None:
        frame = compressed_toc(location, compressed)
        location.frame_digest.verify(frame, "compressed table of contents")
    json = extract_toc(location, compressed)
    actual = Digest.from_hash(hashlib.sha256(json))
    for digest in promised:
        if digest != actual:
            digest.verify(json, "table of contents")
    return VerifiedToc(_SEAL, location, json, actual, verified=True)


def trust_unverified_toc(location: TocLocation, compressed: Buffer) -> VerifiedToc:
    """Decompress a table of contents and believe it: whoever can change the blob can change it.

    Digests in `location` are not looked at; call this only where the configuration allows it.

    Args:
        location: from `identify`.
        compressed: the blob's bytes from `location.offset` to `location.end`, or more.

    Raises:
        FormatError: the bytes are no table of contents.
    """
    json = extract_toc(location, compressed)
    return VerifiedToc(_SEAL, location, json, Digest.of(json), verified=False)
