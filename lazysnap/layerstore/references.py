# SPDX-License-Identifier: Apache-2.0
"""Which layers of the store are in use, and by whom.

Clients count: one more when they look at a layer or make one of it, one less when they are done. But a
client that is killed counts no more, and one that is killed while it removes a layer counts twice. So
what lasts is looked up in the storages, and only what does not is counted, by process, as long as the
process lives. References from storages that cannot be looked at are counted for good.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable

import trio

from lazysnap import log
from lazysnap.errors import LazysnapError
from lazysnap.layers.store_names import NamedLayer
from lazysnap.layerstore.storages import Storages, Using

_log = log.get(__name__)


class References:
    """The references to layers.

    Args:
        storages: of clients.
        nursery: where processes are watched.
        changed: called when a process with references has ended.
    """

    def __init__(
        self, storages: Storages, nursery: trio.Nursery, changed: Callable[[], None]
    ) -> None:
        self._storages = storages
        self._nursery = nursery
        self._changed = changed
        self._processes: dict[int, Counter[int]] = {}

    async def used(self, slot: int, pid: int) -> Using:
        """A client has told that it uses a layer.

        Args:
            slot: of the layer.
            pid: of the client, or of a thread of it; 0 if we cannot see it.

        Returns:
            What it does with the layer; a use that is `UNSEEN` is for the caller to count.
        """
        if pid == 0:
            return Using.UNSEEN
        using = await trio.to_thread.run_sync(self._storages.using, pid)
        if using is Using.LOOKING:
            process = _process(pid)
            if process in self._processes or self._watch(process):
                self._processes.setdefault(process, Counter())[slot] += 1
        return using

    def released(self, slot: int, pid: int) -> bool:
        """A client has told that it is done with a layer.

        Returns:
            Whether it had told that it looks at the layer.
        """
        process = _process(pid)
        # It tells so before it removes the layer from its storage, and has done that when it ends.
        if process not in self._processes and not self._watch(process):
            return False
        counts = self._processes.setdefault(process, Counter())
        if counts[slot] <= 0:
            return False
        counts[slot] -= 1
        return True

    def _watch(self, process: int) -> bool:
        """Forget the references of a process when it ends; False if it has, or cannot be seen."""
        try:
            fd = os.pidfd_open(process)
        except (OSError, ValueError):
            return False
        self._nursery.start_soon(self._wait, process, fd)
        return True

    async def _wait(self, process: int, fd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
            self._processes.pop(process, None)
        self._changed()

    def looked_at(self, slot: int) -> bool:
        """Whether a process that lives looks at a layer."""
        return any(counts[slot] > 0 for counts in self._processes.values())

    async def stored(self) -> set[tuple[str, str]] | None:
        """Reference and digest of each layer that is in a storage; None if that cannot be told."""
        try:
            return await trio.to_thread.run_sync(self._storages.layers)
        except LazysnapError as error:
            _log.warning("no layer is released: storages cannot be looked at", error=error)
            return None


def is_stored(name: NamedLayer, stored: set[tuple[str, str]]) -> bool:
    """Whether a layer is in a storage, or in one that cannot be looked at."""
    return name.unseen > 0 or (name.reference, name.digest) in stored


def _process(pid: int) -> int:
    """The process that a thread belongs to; the kernel tells FUSE the thread."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return pid
