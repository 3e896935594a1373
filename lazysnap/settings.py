# SPDX-License-Identifier: Apache-2.0
"""What the parts of a daemon are told of its configuration."""

from __future__ import annotations

from lazysnap.cache_settings import cache_limits
from lazysnap.config import Config
from lazysnap.fetch.scheduler import Limits
from lazysnap.registry.hosts import RegistrySettings
from lazysnap.shard.settings import ShardSettings


def registry_settings(config: Config) -> RegistrySettings:
    """What clients of registries are told."""
    return RegistrySettings(
        plain_http_hosts=frozenset(config.registry.plain_http_hosts),
        retry_seconds=config.registry.retry_seconds,
        stall_seconds=config.registry.stall_seconds,
    )


def shard_settings(config: Config, shards: int) -> ShardSettings:
    """What workers are told.

    Args:
        config: of the daemon.
        shards: how many workers there are.
    """
    return ShardSettings(
        registry=registry_settings(config),
        cache=cache_limits(config),
        log_level=config.log_level,
        log_format=config.log_format,
        decode_threads=config.shards.decode_threads,
        limits=_limits(config, shards),
        background=config.fetch.background,
        background_delay_seconds=config.fetch.background_delay_seconds,
        probe_valid_seconds=config.registry.probe_valid_seconds,
    )


def _limits(config: Config, shards: int) -> Limits:
    """The limits of one shard; those on bytes are shared out."""
    return Limits(
        connections=config.fetch.connections,
        bytes_per_second=-(-config.fetch.bytes_per_second // shards),
        host_bytes_per_second=-(-config.fetch.host_bytes_per_second // shards),
    )
