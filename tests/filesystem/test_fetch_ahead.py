# SPDX-License-Identifier: Apache-2.0
"""Which shards are told of layers that are not mounted yet; they and the profiles are stand-ins."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lazysnap.digest import Digest
from lazysnap.errors import Unavailable
from lazysnap.filesystem.fetch_ahead import FetchAhead
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.filesystem.profile_learner import ProfileLearner
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.prefetch.profile import Read, from_reads
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.reference import Reference
from lazysnap.registry import Registry
from lazysnap.shard.calls import WorkerCalls, remote
from lazysnap.shard.expecting import EXPECTED_SECONDS
from lazysnap.supervisor import Supervisor
from tests.support.clocks import patient_clock

_MANIFEST, _LAYER, _OTHER = (Digest.of(text) for text in (b"manifest", b"layer", b"other"))
_REFERENCE = Reference.parse("registry.test/image:1")


class Shards(Supervisor):
    """Notes what workers are told."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), 2)
        self.calls: list[tuple[int, str, dict[str, Any]]] = []
        self.fault: Exception | None = None

    def worker(self, shard: int, *, timeout: float = 1.0) -> WorkerCalls:
        return remote(partial(self._send, shard))

    async def _send(self, shard: int, name: str, args: Mapping[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append((shard, name, dict(args)))
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


class Bench:
    def __init__(self, root: Path, registry: Registry, nursery: trio.Nursery) -> None:
        self.shards = Shards(root)
        self.learner = ProfileLearner(str(root), self.shards, enabled=False, seconds=0)
        finder = ProfileFinder(str(root), registry, enabled=False)
        self.ahead = FetchAhead(self.shards, finder, self.learner, nursery)

    async def opened(self, layer: Digest, manifest: Digest | None = _MANIFEST) -> None:
        source = LayerSource(_REFERENCE, layer, manifest=manifest)
        self.ahead.opened(source, OpenedLayer("index-of-" + layer.hex[:4], 100))
        await trio.sleep(0.1)


async def test_a_shard_is_told_what_a_start_needs_and_where_it_is(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    async with Registry() as registry:
        it = Bench(tmp_path, registry, nursery)
        reads = {str(_LAYER): [Read("usr/bin/it", 0, 10, 3)]}
        ProfileStore(str(tmp_path)).add(from_reads(_MANIFEST, (), reads))
        await it.opened(_LAYER)
        await it.opened(_OTHER)
        await it.opened(_OTHER, manifest=None)  # nobody knows what a start of it needs
        (home, name, told), (other, _, rest) = it.shards.calls
        assert {home, other} == {0, 1}
        assert name == "expect"
        assert told == {
            "layer": {
                "index": "index-of-" + _LAYER.hex[:4],
                "layer_digest": str(_LAYER),
                "reference": _REFERENCE.name,
                "blob_size": 100,
            },
            "reads": [["usr/bin/it", 0, 10, 3]],
        }
        assert rest["reads"] == []
        # The layer comes where it is expected, as long as it is.
        for _ in range(5):
            it.shards.note(home, "others")
        assert it.shards.choose(str(_LAYER), xattrs=False) == home
        await trio.sleep(EXPECTED_SECONDS)
        assert it.shards.choose(str(_LAYER), xattrs=False) == other
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fault", [Unavailable("gone"), ValueError("a defect")])
async def test_a_shard_that_cannot_be_told_harms_nothing(
    tmp_path: Path, nursery: trio.Nursery, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with Registry() as registry:
        it = Bench(tmp_path, registry, nursery)
        it.shards.fault = fault
        await it.opened(_LAYER)
        assert len(it.shards.calls) == 1
        assert ("early failed" in caplog.text) == isinstance(fault, ValueError)
        assert it.shards._places == {}
