# SPDX-License-Identifier: Apache-2.0
"""Layers of registries that do not answer: a pull soon goes on without us, and others are not held up."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import RegistryUnreachable
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.layer_source import LayerSource
from lazysnap.layers.opener import Opener
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings
from tests.support.clocks import patient_clock
from tests.support.registry import Status, faulty_registry
from tests.support.slow_servers import black_hole, dripping, refusing

_TOC = {oci.TOC_DIGEST: str(Digest.of(b"table of contents"))}
_DRIP = b"HTTP/1.1 206 OK\r\nContent-Length: 131072\r\nContent-Range: bytes 0-131071/131072\r\n\r\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    return patient_clock(monkeypatch)


@pytest.fixture
async def opener(tmp_path: Path) -> AsyncIterator[Opener]:
    async with Registry(RegistrySettings(), Anonymous()) as registry:
        yield Opener(str(tmp_path), registry, BuilderPool(1))


class NoName(trio.abc.HostnameResolver):
    """No name can be resolved."""

    async def getaddrinfo(self, *_arguments: object) -> object:  # type: ignore[override]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_arguments: object) -> object:  # type: ignore[override]
        raise NotImplementedError


def _source(host: str, number: int, *, known: bool = True) -> LayerSource:
    reference = Reference.parse(f"{host}/image:1")
    layer, manifest = Digest.of(b"%d" % number), Digest.of(b"manifest")
    if known:
        return LayerSource(reference, layer, annotations=_TOC, size=131072)
    return LayerSource(reference, layer, manifest=manifest)


async def _refused(opener: Opener, source: LayerSource) -> None:
    with pytest.raises(RegistryUnreachable) as caught:
        await opener.open(source)
    assert caught.value.reason == "registry-unreachable"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "how", ["refuses", "accepts", "accepts nothing", "no name", "429", "429 later", "503"]
)
async def test_twenty_layers_of_a_dead_registry_cost_no_more_than_one(
    clock: trio.testing.MockClock, opener: Opener, how: str, together: bool, known: bool
) -> None:
    async with AsyncExitStack() as stack:
        if how == "no name":
            trio.socket.set_custom_hostname_resolver(NoName())
            host = "registry.test"
        elif how == "refuses":
            host = refusing()
        elif how.startswith("accepts"):
            host = stack.enter_context(black_hole(accepts=how == "accepts"))
        else:
            server = await stack.enter_async_context(faulty_registry())
            headers = {"Retry-After": "1"} if how == "429 later" else {}
            server.faults.append(Status(int(how[:3]), headers, times=10**9))
            host = server.host
        began = trio.current_time()
        if together:
            async with trio.open_nursery() as nursery:
                for number in range(1, 20):
                    nursery.start_soon(_refused, opener, _source(host, number, known=known))
        for number in range(20):
            await _refused(opener, _source(host, number, known=known))
        assert trio.current_time() - began <= 6


@pytest.mark.parametrize("size", [1, 3000])
async def test_a_dripping_registry_is_given_up(
    clock: trio.testing.MockClock, opener: Opener, size: int
) -> None:
    async with dripping(_DRIP, bytes(131072), size=size, seconds=1) as host:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(_refused, opener, _source(host, number))
        assert trio.current_time() - began <= 16
        await _refused(opener, _source(host, 0))
        assert trio.current_time() - began <= 16


async def test_layers_that_come_late_together_are_one_outage(
    clock: trio.testing.MockClock, opener: Opener
) -> None:
    async with dripping(_DRIP, bytes(131072), size=3000, seconds=1) as host:
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(_refused, opener, _source(host, number))
        await trio.sleep(15)  # more than one outage is remembered for, and less than a repeated one
        began = trio.current_time()
        await _refused(opener, _source(host, 0))
        assert trio.current_time() - began > 1


async def test_a_large_layer_may_take_longer(clock: trio.testing.MockClock, opener: Opener) -> None:
    """As when sixteen of them share a line of 10 Mbit/s."""
    large = replace(_source("127.0.0.1:1", 1), size=256 << 20)
    with pytest.raises(RegistryUnreachable, match="within 75 s"), opener._in_time(large, 2 << 20):
        await trio.sleep(60)
        await trio.sleep(60)
