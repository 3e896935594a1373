# SPDX-License-Identifier: Apache-2.0
"""Where a worker has the bytes of its layers from, and what it fetches before anybody reads.

A layer's bytes can be fetched as soon as its index is on disk, by the name of the index and before any slot
shows the layer: while containerd is still asking for the layers below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import trio

from lazysnap import log
from lazysnap.cache import Cache
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError
from lazysnap.fetch.byte_source import Counters
from lazysnap.fetch.fetcher import Fetcher, Plan
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.requests import Requests
from lazysnap.fetch.scheduler import Priority, Scheduler
from lazysnap.fetch.tail_source import TailSource
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin
from lazysnap.prefetch.guesser import Guesser
from lazysnap.prefetch.profile import Read, landmark_plan, locate
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.prefetch.readahead import prepare_start
from lazysnap.prefetch.tree_walks import TreeWalks
from lazysnap.reference import Reference
from lazysnap.registry.client import Blob, Registry

_log = log.get(__name__)

Begun = Callable[[str, LayerIndex, int], None]
"""Told the name of an index, the index, and the node of a file whose beginning is read."""


class _Source(NamedTuple):
    """Where the bytes of a layer come from, and what looks after that."""

    blob: Blob
    fetcher: Fetcher
    guesser: Guesser


class Fetching:
    """What is fetched for the layers of a worker.

    Args:
        registry: client for blobs.
        cache: where the bytes are kept.
        contents: the process's table of open contents.
        scheduler: of the process.
        ahead: works through what is wanted before it is read.
        nursery: where fetching happens.
        decoders: limits the threads that decode.
    """

    def __init__(
        self,
        registry: Registry,
        cache: Cache,
        contents: OpenFiles,
        scheduler: Scheduler,
        ahead: PrefetchQueue,
        nursery: trio.Nursery,
        decoders: trio.CapacityLimiter,
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._contents = contents
        self._scheduler = scheduler
        self._ahead = ahead
        self._nursery = nursery
        self._decoders = decoders
        # By the names of indexes.
        self._sources: dict[str, _Source] = {}

    def make_reader(self, origin: LayerOrigin, index: LayerIndex, begun: Begun) -> LayerReader:
        """The reader of a layer that is seen for the first time.

        Args:
            origin: where the layer's bytes are.
            index: of the layer.
            begun: told of files that are begun to be read.
        """
        reference = Reference.parse(origin.reference)
        digest = Digest.parse(origin.layer_digest)
        blob = self._registry.blob(reference, digest, origin.blob_size)
        counters = Counters()
        requests = Requests(
            index,
            TailSource(blob, self._cache.paths.index(origin.index), counters),
            counters,
            contents=self._contents,
            nursery=self._nursery,
            decoders=self._decoders,
            scheduler=self._scheduler,
            host=reference.host,
            name=origin.layer_digest,
        )
        fetcher = Fetcher(index, requests, self._scheduler)

        def add(plan: Plan) -> None:
            self._ahead.add(fetcher, plan, Priority.PREFETCH)

        guesser = Guesser(index, add)
        self._sources[origin.index] = _Source(blob, fetcher, guesser)
        host = self._scheduler.host(reference.host)
        walks = TreeWalks(index, add, lambda: host.bandwidth)

        def missed(node: int) -> None:
            guesser.missed(node)
            walks.missed(node)

        return LayerReader(
            index, self._contents, fetcher, missed, partial(begun, origin.index, index)
        )

    def blob(self, index: str) -> Blob:
        """The blob of a layer that has a reader, by the name of its index."""
        return self._sources[index].blob

    def forget(self, index: str, reader: LayerReader) -> None:
        """Let go of a layer that has no reader any more, and of what was to be fetched of it."""
        self._ahead.drop(reader.fetcher)
        self._sources.pop(index, None)

    async def prefetch(
        self, origin: LayerOrigin, reader: LayerReader, reads: Sequence[Any]
    ) -> None:
        """Fetch what is needed first; wrong advice changes nothing.

        Args:
            origin: of the layer.
            reader: of the layer.
            reads: of a profile, as in `profile.Read`; without them the layer's landmark counts.
        """
        try:
            if reads:
                wanted = msgspec.convert(reads, list[Read])
                found = await trio.to_thread.run_sync(locate, reader.index, wanted)
                source = self._source(origin, reader)
                if source is not None:
                    source.guesser.expect(node for node, _ in found)
                plan = await trio.to_thread.run_sync(
                    prepare_start, self._cache, reader.index, found
                )
            else:
                plan = landmark_plan(reader.index) or Plan(())
        except (LazysnapError, msgspec.ValidationError) as error:
            _log.warning("nothing is prefetched", layer=origin.layer_digest, error=error)
            return
        if self._source(origin, reader) is not None:
            self._ahead.add(reader.fetcher, plan, Priority.PREFETCH)

    def _source(self, origin: LayerOrigin, reader: LayerReader) -> _Source | None:
        """What belongs to a reader, unless the layer was let go of, and perhaps loaded again."""
        source = self._sources.get(origin.index)
        return source if source is not None and source.fetcher is reader.fetcher else None
