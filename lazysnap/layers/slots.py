# SPDX-License-Identifier: Apache-2.0
"""Says what a directory of a shard serves: one small file for each slot, `slots/<slot>`.

The daemon writes it before anyone can look the directory up; a worker reads it whenever it needs it,
so that a worker that was just started knows as much as the one before. Slot numbers are never used
twice. Releases read each other's records, see "Kept between releases" in `lazysnap.shard`.
"""

from __future__ import annotations

import os

import msgspec

from lazysnap.layers import record_files
from lazysnap.paths import Root

_VERSION = 1


class LayerOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of a layer are.

    Attributes:
        index: name of the index file below `cache/index`.
        layer_digest: of the compressed blob.
        reference: image reference that the blob is fetched by.
        blob_size: of the compressed blob, in bytes.
    """

    index: str
    layer_digest: str
    reference: str
    blob_size: int


class Inherited(msgspec.Struct, array_like=True, frozen=True):
    """The attributes of a directory that the layer leaves out, from the layers below it."""

    node: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: list[tuple[bytes, bytes]]


class SlotRecord(LayerOrigin, frozen=True, kw_only=True):
    """The layer that a slot serves.

    Attributes, beside those of `LayerOrigin`:
        slot: its number, from 1.
        shard: the shard whose directory it is.
        annotations: of the layer, as far as they are needed to make the index anew.
        manifest: digest of the manifest by which the image was pulled; empty if it is not known.
        described: whether that manifest was read, and has the annotations.
        opaque_xattr: name of the xattr that marks opaque directories for this node's overlay; empty
            if they hide nothing here.
        inherited: attributes of left-out directories.
        below: the slots of the layers below it, nearest first.
    """

    version: int = _VERSION
    slot: int
    shard: int
    manifest: str = ""
    # Written only if it is set: the record is as it was before this release otherwise.
    described: bool | msgspec.UnsetType = msgspec.UNSET
    opaque_xattr: bytes = b"trusted.overlay.opaque"
    inherited: list[Inherited] = []
    below: list[int] = []
    annotations: dict[str, str] = {}


def write_slot(root: str, record: SlotRecord) -> None:
    """Store a record so that it survives a crash.

    Args:
        root: lazysnap's root directory.
        record: what to store.

    Raises:
        Internal: the disk refuses.
    """
    record_files.write(Root(root).slots, record)


def read_slot(root: str, slot: int) -> SlotRecord:
    """Read a record.

    Raises:
        NotFound: there is no such slot.
        Internal: the file cannot be read, or is not a record.
    """
    return record_files.read(Root(root).slots, slot, SlotRecord, _VERSION)


def remove_slot(root: str, slot: int) -> None:
    """Remove a record; one that is not there is no error.

    Raises:
        Internal: the disk refuses.
    """
    record_files.remove(Root(root).slots, slot)


def list_slots(root: str) -> list[int]:
    """The slots that have a record."""
    return record_files.numbers(Root(root).slots)


def slots_changed(root: str) -> int:
    """When a record was last written or removed, in nanoseconds by the file system's clock; 0: never."""
    try:
        return os.stat(Root(root).slots).st_mtime_ns
    except FileNotFoundError:
        return 0
