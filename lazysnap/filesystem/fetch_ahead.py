# SPDX-License-Identifier: Apache-2.0
"""Has shards fetch what a start needs of a layer as soon as the layer's index is on disk.

containerd mounts one layer after the other and does other work between two of them, while the network would
be idle. Nothing depends on it: when the layer is mounted its shard is told the same once more, and fetches
what it has not begun to fetch.
"""

from __future__ import annotations

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.filesystem.profile_learner import ProfileLearner
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.slots import LayerOrigin
from lazysnap.shard.expecting import EXPECTED_SECONDS
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
_CALL_SECONDS = 10.0


class FetchAhead:
    """Tells shards of layers that will soon be mounted.

    Args:
        supervisor: of the shards.
        finder: of profiles in the registry.
        learner: has the profiles.
        nursery: where shards are told.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        finder: ProfileFinder,
        learner: ProfileLearner,
        nursery: trio.Nursery,
    ) -> None:
        self._supervisor = supervisor
        self._finder = finder
        self._learner = learner
        self._nursery = nursery

    def opened(self, source: LayerSource, opened: OpenedLayer) -> None:
        """The index of a layer is on disk that will soon be mounted; returns at once."""
        if source.manifest is not None:
            self._nursery.start_soon(self._tell, source, opened)

    async def _tell(self, source: LayerSource, opened: OpenedLayer) -> None:
        assert source.manifest is not None
        layer = LayerOrigin(
            index=opened.index,
            layer_digest=str(source.digest),
            reference=source.reference.name,
            blob_size=opened.blob_size,
        )
        with advice(_log, "fetching a layer early failed", layer=layer.layer_digest):
            await self._finder.settled(source.manifest)
            reads = await self._learner.early_reads(source.manifest, layer.layer_digest)
            with self._supervisor.reserved(layer.layer_digest) as shard:
                await self._supervisor.worker(shard, timeout=_CALL_SECONDS).expect(layer, reads)
                await trio.sleep(EXPECTED_SECONDS)  # the shard waits as long
