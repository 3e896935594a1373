# SPDX-License-Identifier: Apache-2.0
"""The settings of workers: written by the daemon, read by each worker when it starts.

Either may be of another release, see "Kept between releases" in `lazysnap.shard`.
"""

from __future__ import annotations

import os

import msgspec

from lazysnap import atomic_files
from lazysnap.cache.eviction import CacheLimits
from lazysnap.errors import Internal
from lazysnap.fetch.scheduler import Limits
from lazysnap.paths import Root
from lazysnap.registry.hosts import RegistrySettings

FIRST_XATTR_SHARD = 64
"""Shards from this number on serve extended attributes; those below answer that there are none.

overlay asks for an attribute at each look-up, and the kernel remembers only one answer: that a whole
mount has none (ENOSYS). Most layers have none, and their trees are then read in a third of the time.
"""


class ShardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has to know besides its slots.

    Attributes:
        registry: of the registry client.
        cache: limits of the cache.
        log_level: debug, info, warning or error.
        log_format: auto, text, json or journal.
        max_requests: FUSE requests that are worked on at once.
        limits: on connections and bytes per second.
        background: fetch all of each layer when there is nothing more urgent.
        background_delay_seconds: how long after a layer was mounted that begins.
        decode_threads: threads that decompress and verify.
        seal_seconds: time between two syncs of the cache.
        probe_seconds: longest time for a reachability check of a registry.
        probe_valid_seconds: for how long a success makes another check needless.
        named: layers are found by the names of an additional layer store, and not by their slots.
    """

    registry: RegistrySettings = RegistrySettings()
    cache: CacheLimits = CacheLimits()
    log_level: str = "info"
    log_format: str = "auto"
    max_requests: int = 128
    limits: Limits = Limits()
    background: bool = True
    background_delay_seconds: float = 10.0
    decode_threads: int = 4
    seal_seconds: float = 5.0
    probe_seconds: float = 1.5
    probe_valid_seconds: float = 60.0
    named: bool = False


def serves_xattrs(root: str, number: int) -> bool:
    """Whether a shard serves extended attributes."""
    return number >= FIRST_XATTR_SHARD or os.path.exists(Root(root).shard_xattrs)


def serve_xattrs_everywhere(root: str) -> None:
    """Make all shards of a root serve extended attributes from now on, for good.

    While the kernel serves trees itself, it does not ask shards for attributes, so layers with some are put
    on any shard. After a restart the kernel may not be able to, and then it asks.

    Raises:
        Internal: the disk refuses.
    """
    path = Root(root).shard_xattrs
    try:
        os.makedirs(Root(root).shards, mode=0o711, exist_ok=True)
        with open(path, "w"):
            pass
    except OSError as error:
        raise Internal(f"cannot write {path}: {error.strerror}") from error


def write_settings(root: str, settings: ShardSettings) -> None:
    """Store the settings for workers that start from now on.

    Raises:
        Internal: the disk refuses.
    """
    path = Root(root).shard_settings
    try:
        os.makedirs(Root(root).shards, mode=0o711, exist_ok=True)
        # The daemon writes them again when it starts.
        atomic_files.replace(path, msgspec.msgpack.encode(settings), sync=False)
    except OSError as error:
        raise Internal(f"cannot write {path}: {error.strerror}") from error


def read_settings(root: str) -> ShardSettings:
    """The stored settings; defaults where there are none or they cannot be read."""
    try:
        with open(Root(root).shard_settings, "rb") as file:
            return msgspec.msgpack.decode(file.read(), type=ShardSettings)
    except (OSError, msgspec.MsgspecError):
        return ShardSettings()
