# SPDX-License-Identifier: Apache-2.0
"""Small records in files of their own, one for each slot: `slots/<slot>`, `names/<slot>`.

The daemon writes them; workers read them whenever they need them, so that a worker that was just started
knows as much as the one before. All functions block.
"""

from __future__ import annotations

import os
from typing import Protocol, TypeVar

import msgspec

from lazysnap import atomic_files
from lazysnap.errors import Internal, NotFound


class Record(Protocol):
    """A record that can be kept: a struct of msgspec with these."""

    @property
    def version(self) -> int:
        """Of the record's form."""

    @property
    def slot(self) -> int:
        """The number that it is found by."""


R = TypeVar("R", bound=Record)


def write(directory: str, record: Record) -> None:
    """Store a record so that it survives a crash.

    Args:
        directory: of such records; made when missing.
        record: what to store.

    Raises:
        Internal: the disk refuses.
    """
    path = _path(directory, record.slot)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        atomic_files.replace(path, msgspec.msgpack.encode(record))
    except OSError as error:
        raise Internal(f"cannot write {path}: {error.strerror}") from error


def read(directory: str, slot: int, kind: type[R], version: int) -> R:
    """Read a record.

    Args:
        directory: of such records.
        slot: whose.
        kind: of the record.
        version: that it must have.

    Raises:
        NotFound: there is none.
        Internal: the file cannot be read, or is no such record.
    """
    path = _path(directory, slot)
    try:
        with open(path, "rb") as file:
            record = msgspec.msgpack.decode(file.read(), type=kind)
    except FileNotFoundError as error:
        raise NotFound(f"there is no {path}") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise Internal(f"{path} cannot be read: {error}") from error
    if record.version != version or record.slot != slot:
        raise Internal(f"{path} is of another version of lazysnap, or of another slot")
    return record


def remove(directory: str, slot: int) -> None:
    """Remove a record; one that is not there is no error.

    Raises:
        Internal: the disk refuses.
    """
    path = _path(directory, slot)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Internal(f"cannot remove {path}: {error.strerror}") from error


def numbers(directory: str) -> list[int]:
    """The slots that have a record, ascending."""
    try:
        return sorted(int(name) for name in os.listdir(directory) if name.isdigit())
    except FileNotFoundError:
        return []


def _path(directory: str, slot: int) -> str:
    return os.path.join(directory, str(slot))
