# SPDX-License-Identifier: Apache-2.0
"""Notes what is read of the layers of a shard while a start is watched, for a profile.

The kernel reads objects by itself, and nobody sees these reads. It can be seen that it opens an object,
and a small file that is opened counts as read. So new objects that are larger are held (see
`cache.object_states`) while a start is watched. For a profile that is recorded on purpose, all objects are
held, also old ones.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import Iterable, Sequence
from functools import partial

import pyfuse3
import trio

from lazysnap import log
from lazysnap.cache import Cache
from lazysnap.cache.watch import ObjectWatch
from lazysnap.errors import FailedPrecondition, LazysnapError
from lazysnap.fetch.members import of_file
from lazysnap.index.reader import LayerIndex
from lazysnap.prefetch.profile import Read
from lazysnap.prefetch.recorder import EXPIRES_SECONDS, Recorder
from lazysnap.prefetch.recorder import reads as reads_of
from lazysnap.shard.mounted_layers import MountedLayer, MountedLayers

_log = log.get(__name__)
# As much as the kernel reads at once when it reads ahead.
_SMALL = 128 << 10
# Objects whose first opening is noted.
_OPENED_MOST = 50_000


class ReadRecording:
    """Watches starts.

    Args:
        layers: of the shard.
        cache: whose objects are held.
        watch: reports which objects are opened; None if the kernel cannot do that.
        nursery: where objects are shown again.
    """

    def __init__(
        self,
        layers: MountedLayers,
        cache: Cache,
        watch: ObjectWatch | None,
        nursery: trio.Nursery,
    ) -> None:
        self._layers = layers
        self._objects = cache.objects
        self._watch = watch
        self._nursery = nursery
        # Objects that anybody has opened since the last session began.
        self._opened: set[bytes] = set()
        # Sessions that go on to their end, whatever is read.
        self._wanted: set[float] = set()

    async def record(self, slots: Sequence[int], since: float, fresh: bool = False) -> None:
        """Begin to note what is read.

        Args:
            slots: of the image.
            since: when the start began, by the machine's monotonic clock.
            fresh: have the kernel forget what it has, as reading that would not be seen.
        """
        if fresh:
            # Commands that were killed leave sessions behind.
            expired = time.monotonic() - EXPIRES_SECONDS
            self._wanted = {begun for begun in self._wanted if begun > expired} | {since}
        for slot in slots:
            layer = await self._layers.load(slot)
            if layer.recorder is None:
                place = partial(_place, layer.index)
                layer.recorder = Recorder(place, partial(self._walked, layer))
            layer.recorder.begin(since)
            self._opened.clear()
            self.hold()
            if fresh:
                await trio.to_thread.run_sync(self._drop_pages, layer)

    async def recorded(self, slots: Sequence[int], since: float) -> dict[str, list[Read]]:
        """End `record`; what was read, by layer digest.

        Args:
            slots: of the image.
            since: as it was given to `record`.

        Raises:
            FailedPrecondition: some of the slots were not recorded to the end.
        """
        self._wanted.discard(since)
        found: dict[str, list[Read]] = {}
        lost = False
        for slot in slots:
            layer = self._layers.get(slot)
            recorder = None if layer is None else layer.recorder
            notes = None if recorder is None else recorder.end(since)
            if layer is None or recorder is None or notes is None:
                lost = True
                continue
            if recorder.idle:
                layer.recorder = None
            joined = await trio.to_thread.run_sync(reads_of, layer.index, notes, since)
            found.setdefault(layer.record.layer_digest, []).extend(joined)
        await self._release()
        if lost:
            raise FailedPrecondition("the worker was replaced, or a layer removed, while recording")
        return found

    def under_way(self) -> bool:
        """Whether a watched start may be going on."""
        return any(recorder.worthwhile for _, recorder in self._recorded())

    def hold(self) -> None:
        """Hold what the kernel would read unnoticed, while a watched start may be going on.

        Openings are noted until the session ends, as that costs readers nothing.
        """
        if self._watch is not None:
            try:
                self._watch.tell_opens(any(each.attentive for _, each in self._recorded()))
            except LazysnapError as error:
                _log.warning("what the kernel opens is not noted", error=error)
                self._watch = None
        wanted = any(self._wanted & recorder.sessions for _, recorder in self._recorded())
        most = 0 if wanted or self._watch is None else _SMALL
        self._objects.hold_above = most if self.under_way() else None

    def opened(self, keys: Iterable[bytes]) -> None:
        """Note that objects were opened, most likely by the kernel for a reader of the files.

        Args:
            keys: of the objects.
        """
        for key in keys:
            if key not in self._opened and len(self._opened) < _OPENED_MOST:
                self._opened.add(key)
                self._note(key)

    def _note(self, key: bytes) -> None:
        """Note that all of a small file is read, once for each session even if several layers have it."""
        told: set[float] = set()
        for layer, recorder in self._recorded():
            if recorder.sessions <= told:
                continue
            node = layer.index.find(key)
            if node >= 0 and (size := layer.index.file(node).size) <= _SMALL:
                told |= recorder.sessions
                recorder.note(node, 0, size)
                layer.reader.begun(node)

    def _walked(self, layer: MountedLayer) -> None:
        """End watching, as somebody reads a whole part of a layer, which no starting program does.

        From now on the kernel opens files by itself, which is several times faster.
        """
        if layer.recorder is None:
            return
        over = layer.recorder.sessions - self._wanted
        for _, recorder in self._recorded():
            recorder.give_up(over)
        self._nursery.start_soon(self._release)

    def _recorded(self) -> list[tuple[MountedLayer, Recorder]]:
        layers = (self._layers.get(slot) for slot in self._layers.slots_loaded())
        return [(layer, layer.recorder) for layer in layers if layer and layer.recorder]

    async def _release(self) -> None:
        """Show the kernel what was held, if nothing is watched any more."""
        self.hold()
        await trio.to_thread.run_sync(self._objects.release)

    def _drop_pages(self, layer: MountedLayer) -> None:
        """Drop the kernel's pages of a layer.

        It runs in a thread, as the kernel may wait for requests that the event loop answers.
        """
        index = layer.index
        for node in range(index.node_count):
            attributes = index.attributes(node)
            if stat.S_ISREG(attributes.mode) and attributes.size:
                self._objects.hold(index.file(node).object_key)
                # ENOENT: the kernel does not know the inode
                with contextlib.suppress(OSError):
                    pyfuse3.invalidate_inode(layer.base + node)


def _place(index: LayerIndex, node: int) -> int:
    """The first member that a file is in."""
    return next(of_file(index, node), 0)
