# SPDX-License-Identifier: Apache-2.0
"""A private containerd for the tests of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from lazysnap.containerd.client import Containerd
from tests.support.containerd import PrivateContainerd, private_containerd


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    # not tmp_path: the name of a long test makes a path too long for a socket
    with private_containerd(tmp_path_factory.mktemp("c")) as containerd:
        yield containerd


@pytest.fixture
async def client(daemon: PrivateContainerd) -> AsyncIterator[Containerd]:
    async with Containerd(daemon.address) as containerd:
        yield containerd


@pytest.fixture
async def leased(client: Containerd) -> AsyncIterator[Containerd]:
    # without a lease garbage collection may take away what a test has just written
    async with client.lease() as leased:
        yield leased
