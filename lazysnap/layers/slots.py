# SPDX-License-Identifier: Apache-2.0
"""What a directory of a shard serves: one small file for each slot, `slots/<slot>`.

The daemon writes it before anyone can look the directory up; a worker reads it whenever it needs it,
so that a worker that was just started knows as much as the one before. Slot numbers are never used
twice.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from lazysnap.errors import Internal, NotFound

_VERSION = 1


class Inherited(msgspec.Struct, array_like=True, frozen=True):
    """The attributes of a directory that the layer leaves out, from the layers below it."""

    node: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: list[tuple[bytes, bytes]]


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a slot serves.

    Attributes:
        slot: its number, from 1.
        shard: the shard whose directory it is.
        layer_digest: of the compressed blob.
        index: name of the index file below `cache/index`.
        annotations: of the layer, as far as they are needed to make the index anew.
        reference: image reference that the blob is fetched by.
        blob_size: of the compressed blob, in bytes.
        manifest: digest of the manifest by which the image was pulled; empty if it is not known.
        opaque_xattr: name of the xattr that marks opaque directories for this node's overlay; empty
            if they hide nothing here.
        inherited: attributes of left-out directories.
        below: the slots of the layers below it, nearest first.
    """

    version: int = _VERSION
    slot: int
    shard: int
    layer_digest: str
    index: str
    reference: str
    blob_size: int
    manifest: str = ""
    opaque_xattr: bytes = b"trusted.overlay.opaque"
    inherited: list[Inherited] = []
    below: list[int] = []
    annotations: dict[str, str] = {}


def _path(root: str, slot: int) -> str:
    return os.path.join(root, "slots", str(slot))


def write_slot(root: str, record: SlotRecord) -> None:
    """Store a record so that it survives a crash.

    Args:
        root: lazysnap's root directory.
        record: what to store.

    Raises:
        Internal: the disk refuses.
    """
    path = _path(root, record.slot)
    aside = f"{path}.new"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(msgspec.msgpack.encode(record))
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise Internal(f"cannot write {path}: {error.strerror}") from error


def read_slot(root: str, slot: int) -> SlotRecord:
    """Read a record.

    Raises:
        NotFound: there is no such slot.
        Internal: the file cannot be read, or is not a record.
    """
    path = _path(root, slot)
    try:
        with open(path, "rb") as file:
            record = msgspec.msgpack.decode(file.read(), type=SlotRecord)
    except FileNotFoundError as error:
        raise NotFound(f"there is no slot {slot}") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise Internal(f"{path} cannot be read: {error}") from error
    if record.version != _VERSION or record.slot != slot:
        raise Internal(f"{path} is of another version of lazysnap, or of another slot")
    return record


def remove_slot(root: str, slot: int) -> None:
    """Remove a record; one that is not there is no error.

    Raises:
        Internal: the disk refuses.
    """
    try:
        os.unlink(_path(root, slot))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Internal(f"cannot remove {_path(root, slot)}: {error.strerror}") from error


def list_slots(root: str) -> list[int]:
    """The slots that have a record."""
    try:
        return sorted(int(n) for n in os.listdir(os.path.join(root, "slots")) if n.isdigit())
    except FileNotFoundError:
        return []


def slots_changed(root: str) -> int:
    """When a record was last written or removed, in nanoseconds by the file system's clock; 0: never."""
    try:
        return os.stat(os.path.join(root, "slots")).st_mtime_ns
    except FileNotFoundError:
        return 0
