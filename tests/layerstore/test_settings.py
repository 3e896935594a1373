# SPDX-License-Identifier: Apache-2.0
"""What the store makes of the configuration."""

from __future__ import annotations

import pytest

from lazysnap.shard.settings import read_settings
from tests.layerstore.scene import CONFIG, Scene

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.podman]


def test_the_one_shard_has_all_of_the_bandwidth(it: Scene) -> None:
    it.store.stop()
    limits = "bytes_per_second = 4_000_000\nhost_bytes_per_second = 1_000_000\n"
    (it.directory / "config.toml").write_text(f"{CONFIG}{limits}[shards]\ncount = 4\n")
    it.store.start()
    found = read_settings(str(it.store.root)).limits
    assert (found.bytes_per_second, found.host_bytes_per_second) == (4_000_000, 1_000_000)
