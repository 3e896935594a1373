# SPDX-License-Identifier: Apache-2.0
"""Under which name a slot is found in an additional layer store: a small file for each, `names/<slot>`.

The store's daemon writes it when the slot can be used; workers read it, so that one that was just
started knows as much as the one before.
"""

from __future__ import annotations

import msgspec

from lazysnap.layers import record_files
from lazysnap.paths import Root

_VERSION = 1


class NamedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A name in the store.

    Attributes:
        slot: what it names.
        reference: of the image, as the client of the store writes it.
        digest: by which the client asks for the layer: of its table of contents, or of its blob.
        info: what the client is told of the layer, as JSON.
        unseen: references of clients whose storage this machine cannot look at.
    """

    version: int = _VERSION
    slot: int
    reference: str
    digest: str
    info: bytes
    unseen: int = 0


def write_name(root: str, name: NamedLayer) -> None:
    """Store a name so that it survives a crash.

    Raises:
        Internal: the disk refuses.
    """
    record_files.write(Root(root).names, name)


def read_name(root: str, slot: int) -> NamedLayer:
    """Read a name.

    Raises:
        NotFound: the slot has none.
        Internal: the file cannot be read, or is no name.
    """
    return record_files.read(Root(root).names, slot, NamedLayer, _VERSION)


def remove_name(root: str, slot: int) -> None:
    """Remove a name; one that is not there is no error.

    Raises:
        Internal: the disk refuses.
    """
    record_files.remove(Root(root).names, slot)


def list_names(root: str) -> list[int]:
    """The slots that have names."""
    return record_files.numbers(Root(root).names)
