# SPDX-License-Identifier: Apache-2.0
"""All that a worker knows of one layer, whichever slots show it.

`MountedLayers` makes and closes it; the modules that do something for a layer keep here what they have to
remember of it, so that all of that is gone with the layer. If the layer is loaded again later, it is
another `ServedLayer`. Knows nothing of slots' records, FUSE or the control socket.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import trio

from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.scheduler import Priority
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin
from lazysnap.prefetch.guesser import Guesser
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.registry.client import Blob


class FailedProbe(NamedTuple):
    """A look whether a layer's blob can be had, which found that it cannot.

    Attributes:
        at: when, by time.monotonic().
        problem: why.
    """

    at: float
    problem: str


class Expectation:
    """Somebody has said that a slot will soon show a layer.

    Attributes:
        reads: what is fetched ahead until then.
        shown: set when a slot shows the layer.
    """

    def __init__(self, reads: list[Any]) -> None:
        self.reads = reads
        self.shown = trio.Event()


class ServedLayer:
    """One layer.

    Args:
        origin: where its bytes are.
        reader: reads its files.
        blob: at its registry.
        guesser: guesses what is read next.
        ahead: fetches before anybody reads.

    Attributes:
        index: of the layer.
        slots: the loaded slots that show it, in the order in which they were loaded.
        expectations: of it; as long as there is one, the layer is kept without a slot.
        closed: it is not served any more; nothing more is fetched ahead of it.
        followed: files whose libraries were looked for, see `library_prefetch`.
        drained: set when all is there that `drain` asked for last; None if it never did.
        complete_at: the generation of the cache that had all content; None if none was seen.
        failed_probe: the last probe, if it failed, see `health`.
    """

    def __init__(
        self,
        origin: LayerOrigin,
        reader: LayerReader,
        blob: Blob,
        guesser: Guesser,
        ahead: PrefetchQueue,
    ) -> None:
        self.origin = origin
        self.reader = reader
        self.blob = blob
        self.guesser = guesser
        self.slots: list[int] = []
        self.expectations: list[Expectation] = []
        self.closed = False
        self.followed: set[int] = set()
        self.drained: trio.Event | None = None
        self.complete_at: int | None = None
        self.failed_probe: FailedProbe | None = None
        self._ahead = ahead

    @property
    def index(self) -> LayerIndex:
        """The index of the layer."""
        return self.reader.index

    def fetch_ahead(
        self, plan: Plan, priority: Priority = Priority.PREFETCH, *, delay_seconds: float = 0.0
    ) -> trio.Event:
        """Fetch members before anybody reads them.

        Args:
            plan: which members, and when they will be needed.
            priority: prefetch or background.
            delay_seconds: wait so long before it begins.

        Returns:
            An event that is set when all of the plan has been dealt with, or the layer was closed.
        """
        if self.closed:
            done = trio.Event()
            done.set()
            return done
        return self._ahead.add(self.reader.fetcher, plan, priority, delay_seconds=delay_seconds)

    def fetches_all(self) -> bool:
        """Whether all of it is being fetched in the background."""
        return self._ahead.has(self.reader.fetcher, Priority.BACKGROUND)

    def close(self) -> None:
        """Give up what was to be fetched ahead, now and later."""
        self.closed = True
        self._ahead.drop(self.reader.fetcher)
