# SPDX-License-Identifier: Apache-2.0
"""Which layers are opened before they are asked for; who opens them is a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from lazysnap.digest import Digest
from lazysnap.errors import NotLazy
from lazysnap.filesystem.open_ahead import OpenAhead
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.labels import RemoteRequest
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.reference import Reference
from lazysnap.registry import Registry
from tests.support.clocks import patient_clock

_LAYERS = [Digest.of(b"%d" % n) for n in range(4)]
_REFERENCE = Reference.parse("registry.test/image:1")


class Layers:
    """Opens layers, but for one."""

    def __init__(self) -> None:
        self.opened: list[Digest] = []

    async def open(
        self, source: LayerSource, indexed: Callable[[OpenedLayer], object] | None = None
    ) -> OpenedLayer:
        await trio.lowlevel.checkpoint()
        self.opened.append(source.digest)
        if source.digest == _LAYERS[2]:
            raise NotLazy("plain", reason="no-toc-digest")
        if source.digest == _LAYERS[3]:
            raise ValueError("a defect")
        it = OpenedLayer(source.digest.hex, 1)
        if indexed is not None:
            indexed(it)
        return it


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


def _request(layer: int) -> RemoteRequest:
    return RemoteRequest(
        "sha256:chain",
        _REFERENCE.name,
        _LAYERS[layer],
        manifest_digest=Digest.of(b"manifest"),
        upper_layers=tuple(_LAYERS[layer + 1 :]),
    )


async def test_the_layers_above_are_opened_once_in_each_pull(
    tmp_path: Path, nursery: trio.Nursery, clock: trio.testing.MockClock
) -> None:
    layers = Layers()
    told: list[tuple[Digest, str]] = []

    def opened(source: LayerSource, it: OpenedLayer) -> None:
        told.append((source.digest, it.index))

    async with Registry() as registry:
        finder = ProfileFinder(str(tmp_path), registry, enabled=False)
        ahead = OpenAhead(registry, cast(Opener, layers), finder, nursery, opened)
        for layer in range(4):
            ahead.above(_request(layer), _REFERENCE)
            await trio.sleep(1)
        assert sorted(layers.opened) == sorted(_LAYERS[1:])
        assert told == [(_LAYERS[1], _LAYERS[1].hex)]
        # The image was removed, and is pulled again.
        await trio.sleep(120)
        ahead.above(_request(0), _REFERENCE)
        await trio.sleep(1)
        assert sorted(layers.opened) == sorted(_LAYERS[1:] * 2)
