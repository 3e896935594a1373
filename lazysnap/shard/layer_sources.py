# SPDX-License-Identifier: Apache-2.0
"""Where a worker gets the bytes of its layers, and what it fetches before anybody reads.

A layer's bytes can be fetched as soon as its index is on disk. No slot has to show the layer yet, so this
begins while containerd still asks for the layers below it.
"""

from __future__ import annotations

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
from lazysnap.fetch.scheduler import Scheduler
from lazysnap.fetch.tail_source import TailSource
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.slots import LayerOrigin
from lazysnap.prefetch.guesser import Guesser
from lazysnap.prefetch.profile import Read, landmark_plan, locate
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.prefetch.readahead import prepare_start
from lazysnap.prefetch.tree_walks import TreeWalks
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.shard.calls import PackedReads
from lazysnap.shard.mounted_layers import Begun
from lazysnap.shard.served_layer import ServedLayer

_log = log.get(__name__)


class LayerSources:
    """Makes layers whose bytes can be fetched.

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
        *,
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

    def make(self, origin: LayerOrigin, index: LayerIndex, begun: Begun) -> ServedLayer:
        """A layer that is served from now on.

        Args:
            origin: where the layer's bytes are.
            index: of the layer.
            begun: told of files whose beginning is read.
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
            layer.fetch_ahead(plan)

        guesser = Guesser(index, add)
        host = self._scheduler.host(reference.host)
        walks = TreeWalks(index, add, lambda: host.bandwidth)

        def missed(node: int) -> None:
            guesser.missed(node)
            walks.missed(node)

        reader = LayerReader(
            index, self._contents, fetcher, missed, lambda node: begun(layer, node)
        )
        layer = ServedLayer(origin, reader, blob, guesser, self._ahead)
        return layer


async def prefetch(layer: ServedLayer, cache: Cache, reads: PackedReads) -> None:
    """Fetch what is needed first; wrong advice changes nothing.

    Args:
        layer: may be closed meanwhile; then nothing is fetched.
        cache: of the process.
        reads: of a profile; without them the layer's landmark counts.
    """
    index = layer.index
    try:
        if reads:
            wanted = msgspec.convert(reads, list[Read])
            found = await trio.to_thread.run_sync(locate, index, wanted)
            layer.guesser.expect(node for node, _ in found)
            plan = await trio.to_thread.run_sync(prepare_start, cache, index, found)
        else:
            plan = landmark_plan(index) or Plan(())
    except (LazysnapError, msgspec.ValidationError) as error:
        _log.warning("nothing is prefetched", layer=layer.origin.layer_digest, error=error)
        return
    layer.fetch_ahead(plan)


def drain(layer: ServedLayer) -> None:
    """Begin, or go on, to fetch all that is missing of a layer, as somebody asked for that.

    Readers go first, as always. What was fetched and evicted meanwhile is fetched anew by the next call.
    """
    if layer.drained is None or layer.drained.is_set():
        layer.drained = layer.fetch_ahead(Plan(range(layer.index.member_count)))
