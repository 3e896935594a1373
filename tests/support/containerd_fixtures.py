# SPDX-License-Identifier: Apache-2.0
"""pytest fixtures around a private containerd, for a conftest or a module to import."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from lazysnap.containerd.client import Containerd

from .containerd import PrivateContainerd, private_containerd


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    """A private containerd."""
    # not tmp_path: the name of a long test makes a path too long for a socket
    with private_containerd(tmp_path_factory.mktemp("c")) as containerd:
        yield containerd


@pytest.fixture
async def client(daemon: PrivateContainerd) -> AsyncIterator[Containerd]:
    """lazysnap's client of it."""
    async with Containerd(daemon.address) as containerd:
        yield containerd
