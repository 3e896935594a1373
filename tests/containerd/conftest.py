# SPDX-License-Identifier: Apache-2.0
"""A private containerd for the tests of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lazysnap.containerd.client import Containerd
from tests.support.containerd_fixtures import client, daemon

__all__ = ["client", "daemon", "leased"]


@pytest.fixture
async def leased(client: Containerd) -> AsyncIterator[Containerd]:
    # without a lease garbage collection may take away what a test has just written
    async with client.lease() as leased:
        yield leased
