# SPDX-License-Identifier: Apache-2.0
"""What the cache is told of the configuration.

Apart from `settings`, as commands need it that look at the cache only: to load the client for
registries takes longer than all that they do.
"""

from __future__ import annotations

from lazysnap.cache.eviction import CacheLimits
from lazysnap.config import Config


def cache_limits(config: Config) -> CacheLimits:
    """How much of the disk the cache may use."""
    return CacheLimits(
        size_limit_bytes=config.cache.size_limit_bytes,
        reserve_bytes=config.cache.reserve_bytes,
        reserve_percent=config.cache.reserve_percent,
    )
