# SPDX-License-Identifier: Apache-2.0
"""Under which name a slot is found in an additional layer store: a small file for each, `names/<slot>`.

The store's daemon writes it when the slot can be used; workers read it, so that one that was just
started knows as much as the one before.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from lazysnap.errors import Internal, NotFound

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


def _path(root: str, slot: int) -> str:
    return os.path.join(root, "names", str(slot))


def write_name(root: str, name: NamedLayer) -> None:
    """Store a name so that it survives a crash.

    Raises:
        Internal: the disk refuses.
    """
    path = _path(root, name.slot)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(f"{path}.new", "wb") as file:
            file.write(msgspec.msgpack.encode(name))
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{path}.new", path)
    except OSError as error:
        raise Internal(f"cannot write {path}: {error.strerror}") from error


def read_name(root: str, slot: int) -> NamedLayer:
    """Read a name.

    Raises:
        NotFound: the slot has none.
        Internal: the file cannot be read, or is no name.
    """
    path = _path(root, slot)
    try:
        with open(path, "rb") as file:
            name = msgspec.msgpack.decode(file.read(), type=NamedLayer)
    except FileNotFoundError as error:
        raise NotFound(f"slot {slot} has no name") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise Internal(f"{path} cannot be read: {error}") from error
    if name.version != _VERSION or name.slot != slot:
        raise Internal(f"{path} is of another version of lazysnap, or of another slot")
    return name


def remove_name(root: str, slot: int) -> None:
    """Remove a name; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(root, slot))


def list_names(root: str) -> list[int]:
    """The slots that have names."""
    try:
        return sorted(int(n) for n in os.listdir(os.path.join(root, "names")) if n.isdigit())
    except FileNotFoundError:
        return []
