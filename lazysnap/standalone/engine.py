# SPDX-License-Identifier: Apache-2.0
"""A snapshotter for the length of one command, put together for standalone mounts.

Starting it brings a root to what its database says: it starts or mends shards, removes what belongs to no
snapshot, and lets go of slots that nobody needs.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from lazysnap import mounts
from lazysnap.cache import Cache
from lazysnap.filesystem.kernel_tree_mounts import KernelTreeMounts
from lazysnap.filesystem.layer_mounts import LayerMounts, ShardDirectories
from lazysnap.filesystem.layer_unpacker import LayerUnpacker
from lazysnap.filesystem.open_ahead import OpenAhead
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.filesystem.profile_learner import ProfileLearner
from lazysnap.filesystem.shard_filesystem import ShardFilesystem
from lazysnap.layers.builder_pool import Builders
from lazysnap.layers.opener import Opener
from lazysnap.paths import Root
from lazysnap.registry.client import Registry
from lazysnap.registry.hosts import RegistrySettings
from lazysnap.shard.settings import ShardSettings, read_settings, write_settings
from lazysnap.snapshotter.interfaces import Unpacker
from lazysnap.snapshotter.snapshotter import Settings, Snapshotter
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor
from lazysnap.unpack.applier_pool import Appliers

T = TypeVar("T")

# Each is a process, and one serves the readers of a directory well.
_SHARDS = 1


@dataclass(frozen=True)
class Engine:
    """What a command works with.

    Attributes:
        snapshotter: started.
        unpacker: downloads and unpacks layers that are not lazy.
        supervisor: of the shards.
    """

    snapshotter: Snapshotter
    unpacker: Unpacker
    supervisor: Supervisor


def new_supervisor(root: str) -> Supervisor:
    """For the shards of a root."""
    return Supervisor(root, _SHARDS)


def open_store(root: str) -> SnapshotStore:
    """The database of a root."""
    return SnapshotStore(Root(root).database)


def registry_settings(plain_http_hosts: frozenset[str] = frozenset()) -> RegistrySettings:
    """Of a command's own client."""
    return RegistrySettings(plain_http_hosts=plain_http_hosts, local_layouts=True)


async def run(
    root: str,
    store: SnapshotStore,
    registry: Registry,
    settings: RegistrySettings,
    work: Callable[[Engine], Awaitable[T]],
    *,
    find_profiles: bool,
) -> T:
    """Do something with a snapshotter.

    Args:
        root: taken.
        store: its database.
        registry: client.
        settings: of that client; shards get them, too, beside what they have.
        work: is called when all is brought to what the database says.
        find_profiles: look for start-up profiles beside images.

    Raises:
        LazysnapError: what `work` raises, or the snapshotter when it starts.
    """
    changed = _tell_shards(root, settings)
    supervisor = new_supervisor(root)
    cache = Cache(Root(root).cache.path)
    builders = Builders(os.cpu_count() or 1)
    outcome: list[T] = []
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(builders.run)
        try:
            filesystem = _filesystem(
                root, supervisor, cache, registry, builders, nursery, find_profiles
            )
            # Nothing here has to survive a power cut: no mount does.
            snapshotter = Snapshotter(
                root, store, settings=Settings(sync_on_commit=False), filesystem=filesystem
            )
            await snapshotter.start(nursery)
            try:
                if changed:
                    await supervisor.call_all("reload")
                unpacker = LayerUnpacker(registry, Appliers(os.cpu_count() or 1))
                outcome.append(await work(Engine(snapshotter, unpacker, supervisor)))
                await snapshotter.cleanup()
            finally:
                with trio.CancelScope(shield=True):
                    await snapshotter.aclose()
        except Exception as error:  # raised outside, where it is not wrapped into a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome[0]


def _tell_shards(root: str, settings: RegistrySettings) -> bool:
    """Write what workers have to know; whether that is something new."""
    known = read_settings(root)
    hosts = known.registry.plain_http_hosts | settings.plain_http_hosts
    wanted = ShardSettings(
        registry=replace(settings, plain_http_hosts=hosts), log_level="warning", background=False
    )
    write_settings(root, wanted)
    return wanted != known


def _filesystem(
    root: str,
    supervisor: Supervisor,
    cache: Cache,
    registry: Registry,
    builders: Builders,
    nursery: trio.Nursery,
    find_profiles: bool,
) -> ShardFilesystem:
    layer_mounts: LayerMounts
    if os.geteuid() == 0:
        layer_mounts = kernel = KernelTreeMounts(cache, supervisor, kernel_trees=True)
        trees = cache.trees if kernel.serves_trees else ""
    else:
        layer_mounts, trees = ShardDirectories(supervisor), ""
    opener = Opener(cache.index, registry, builders, trees=trees)
    finder = ProfileFinder(root, registry, enabled=find_profiles)
    return ShardFilesystem(
        root,
        supervisor,
        opener,
        nursery,
        ProfileLearner(root, supervisor, enabled=False, seconds=0),
        finder,
        layer_mounts,
        OpenAhead(registry, opener, finder, nursery),
        mounts.overlay_facts().opaque_xattr,
    )
