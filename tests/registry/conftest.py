# SPDX-License-Identifier: Apache-2.0
"""A scripted registry and a client with as little patience as a busy machine allows."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio.testing

from lazysnap.credentials.docker_config import Anonymous
from lazysnap.reference import Reference
from lazysnap.registry import Registry, RegistrySettings
from tests.support.clocks import jumping_clock
from tests.support.registry import FaultyRegistry, faulty_registry

SETTINGS = RegistrySettings(retry_seconds=30, stall_seconds=5, connect_seconds=20)


@pytest.fixture
async def server() -> AsyncIterator[FaultyRegistry]:
    async with faulty_registry() as server:
        yield server


@pytest.fixture
async def registry(server: FaultyRegistry) -> AsyncIterator[Registry]:
    # The server must outlive the client, hence the order of the fixtures.
    async with Registry(SETTINGS, Anonymous()) as registry:
        yield registry


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return jumping_clock()


@pytest.fixture
def image(server: FaultyRegistry) -> Reference:
    return Reference.parse(f"{server.host}/team/app:1")
