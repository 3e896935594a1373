# SPDX-License-Identifier: Apache-2.0
"""The storages of clients: directories of containers/storage that refer to layers of the store.

A layer of a storage that is one of ours has a file `overlay/<id>/additionallayer` with its path. So
what is used can be looked up, whatever was counted and whoever was killed. Which storages there are is
learned from clients: while one makes a layer it holds `overlay-layers/layers.lock` open. All functions
block.
"""

from __future__ import annotations

import base64
import binascii
import enum
import os
from collections.abc import Iterator

from lazysnap import log, mounts
from lazysnap.errors import Internal
from lazysnap.paths import Root

_log = log.get(__name__)
_LOCK = "/overlay-layers/layers.lock"
_DEFAULT = "/var/lib/containers/storage"
_MOST_BYTES = 16 << 10


class Using(enum.Enum):
    """What a process that uses a layer is doing with it."""

    LOOKING = "looking"
    """It will let go of it, or makes a layer of it later."""
    STORING = "storing"
    """It makes a layer in a storage that we can look at."""
    UNSEEN = "unseen"
    """It makes a layer in a storage that we cannot look at."""


class Storages:
    """The storages that are known, in the file `storages`.

    Args:
        root: lazysnap's root directory.
    """

    def __init__(self, root: str) -> None:
        self._path = Root(root).storages
        # That of root is nothing to ordinary users, who cannot look at it.
        self._known = {_DEFAULT} if mounts.overlay_facts().privileged else set()
        try:
            with open(self._path, encoding="utf-8", errors="surrogateescape") as file:
                self._known |= {line.rstrip("\n") for line in file}
        except FileNotFoundError:
            pass

    def using(self, pid: int) -> Using:
        """What a process does, and remember its storage.

        Args:
            pid: of a process that waits for our answer.

        Raises:
            Internal: a new storage cannot be remembered.
        """
        found = Using.LOOKING
        for fd, path in _locks(pid):
            storage = path.removesuffix(_LOCK)
            if not _is_here(fd, path):
                return Using.UNSEEN
            self._remember(storage)
            found = Using.STORING
        return found

    def _remember(self, storage: str) -> None:
        if storage in self._known:
            return
        try:
            with open(self._path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{storage}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Internal(f"cannot write {self._path}: {error.strerror}") from error
        self._known.add(storage)
        _log.info("a storage uses layers", storage=storage)

    def layers(self) -> set[tuple[str, str]]:
        """Reference and digest of each layer that a storage refers to.

        One that is not there has none: then its layers are made anew when they are asked for.

        Raises:
            Internal: a storage is there and cannot be read.
        """
        found = set()
        for storage in list(self._known):  # other threads add to them
            overlay = os.path.join(storage, "overlay")
            try:
                names = os.listdir(overlay)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise Internal(f"storage {overlay} cannot be read: {error.strerror}") from error
            for name in names:
                layer = _layer(os.path.join(overlay, name, "additionallayer"))
                if layer is not None:
                    found.add(layer)
        return found


def _locks(pid: int) -> Iterator[tuple[str, str]]:
    """The locks of storages that a process has open: its descriptor below /proc, and the path."""
    directory = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(directory)
    except OSError:
        return  # it has ended
    for number in numbers:
        try:
            path = os.readlink(f"{directory}/{number}")
        except OSError:
            continue
        if path.endswith(_LOCK):
            yield f"{directory}/{number}", path


def _is_here(fd: str, path: str) -> bool:
    """Whether a path that another process has open is the same file for us."""
    try:
        return os.path.samestat(os.stat(fd), os.stat(path))
    except OSError:
        return False


def _layer(path: str) -> tuple[str, str] | None:
    """The layer that a file `additionallayer` names."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise Internal(f"{path} cannot be read: {error.strerror}") from error
    image, digest = text.rstrip("/").split("/")[-2:] if text.count("/") > 1 else ("", "")
    try:
        return base64.b64decode(image, validate=True).decode(), digest
    except (binascii.Error, ValueError):
        return None
