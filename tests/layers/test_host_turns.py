# SPDX-License-Identifier: Apache-2.0
"""Who waits for a slow host, and who does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from lazysnap import oci
from lazysnap.credentials.docker_config import Anonymous
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.host_turns import HostTurns
from lazysnap.layers.layer_source import LayerSource
from lazysnap.layers.opener import Opener
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings
from tests.support import layers
from tests.support.clocks import jumping_clock
from tests.support.registry import faulty_registry
from tests.support.slow_servers import dripping

_TOC = {oci.TOC_DIGEST: str(Digest.of(b"table of contents"))}
_DRIP = b"HTTP/1.1 206 OK\r\nContent-Length: 131072\r\nContent-Range: bytes 0-131071/131072\r\n\r\n"


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return jumping_clock()


async def test_one_host_cannot_take_all_turns(nursery: trio.Nursery) -> None:
    turns = HostTurns(each=3, total=5)
    running: list[str] = []

    async def hold(host: str) -> None:
        async with turns.turn(host):
            running.append(host)
            await trio.sleep_forever()

    for host in "aaaaabbbbb":
        nursery.start_soon(hold, host)
        await trio.testing.wait_all_tasks_blocked()
    assert running == list("aaabb")
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await trio.testing.wait_all_tasks_blocked()
        assert turns._hosts == {}
        async with turns.turn("c"):
            pass


async def test_a_dripping_registry_holds_up_no_other(
    clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    layer = layers.estargz([layers.file("f", b"x")])
    async with (
        faulty_registry() as server,
        dripping(_DRIP, bytes(131072), size=3000, seconds=1) as slow,
        Registry(RegistrySettings(), Anonymous()) as registry,
        trio.open_nursery() as nursery,
    ):
        builders = BuilderPool(2)
        nursery.start_soon(builders.run)
        opener = Opener(str(tmp_path), registry, builders)
        ended: list[str] = []

        async def attack(number: int) -> None:
            with pytest.raises(LazysnapError):
                await opener.open(
                    LayerSource(
                        Reference.parse(f"{slow}/image:1"),
                        Digest.of(b"%d" % number),
                        annotations=_TOC,
                        size=131072,
                    )
                )
            ended.append("attacker")

        for number in range(100):
            nursery.start_soon(attack, number)
        await trio.sleep(0.2)
        server.add_blob(layer.blob)
        source = LayerSource(
            Reference.parse(f"{server.host}/image:1"),
            Digest.parse(layer.digest),
            annotations=layer.annotations,
        )
        await opener.open(source)
        assert ended == []
        clock.jump(20)
        nursery.cancel_scope.cancel()
