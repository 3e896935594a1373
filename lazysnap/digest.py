# SPDX-License-Identifier: Apache-2.0
"""Content digests in their textual form (`sha256:<hex>`), as in the OCI image specification.

A `Digest` is a `str`, so it can be a key, a label and a file name without conversion; only
`Digest.parse` makes one from text that came from outside. Does no I/O.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from lazysnap.errors import DigestMismatch, FormatError

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
_TEXT = re.compile(r"(sha256|sha384|sha512):([0-9a-f]+)", re.ASCII)


class Digest(str):
    """A checked digest; make one with `parse`, `of` or `from_hash`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Check a digest that came from outside.

        Raises:
            FormatError: the text is not a digest of a known algorithm.
        """
        match = _TEXT.fullmatch(text)
        if match is None or len(match[2]) != _LENGTHS[match[1]]:
            raise FormatError(f"not a digest: {text[:160]!r}")
        return cls(text)

    @classmethod
    def of(cls, data: Buffer) -> Digest:
        """The sha256 digest of `data`."""
        return cls("sha256:" + hashlib.sha256(data).hexdigest())

    @classmethod
    def from_hash(cls, hasher: Any) -> Digest:
        """The digest that a hashlib object has reached."""
        return cls(f"{hasher.name}:{hasher.hexdigest()}")

    @classmethod
    def from_sha256(cls, raw: bytes) -> Digest:
        """The digest with these 32 raw bytes."""
        return cls("sha256:" + raw.hex())

    @property
    def algorithm(self) -> str:
        """The part before the colon."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The part after the colon."""
        return self.partition(":")[2]

    @property
    def raw(self) -> bytes:
        """The digest's bytes."""
        return bytes.fromhex(self.hex)

    def hasher(self) -> Any:
        """A fresh hashlib object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def verify(self, data: Buffer, what: str = "content") -> None:
        """Check `data` against this digest.

        Args:
            data: all of the bytes.
            what: how an error names them.

        Raises:
            DigestMismatch: it is another content.
        """
        hasher = self.hasher()
        hasher.update(data)
        if hasher.hexdigest() != self.hex:
            raise DigestMismatch(f"{what}: digest is {Digest.from_hash(hasher)}, expected {self}")
