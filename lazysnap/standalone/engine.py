# SPDX-License-Identifier: Apache-2.0
"""A snapshotter for the length of one command, put together for standalone mounts.

Starting it makes a root what its database says: it starts or repairs shards, removes what belongs to no
snapshot, and frees slots that no snapshot needs.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from lazysnap.cache import Cache
from lazysnap.filesystem.assembly import Options, Parts, assemble
from lazysnap.filesystem.kernel_tree_mounts import KernelTreeMounts
from lazysnap.filesystem.layer_mounts import LayerMounts, ShardDirectories
from lazysnap.filesystem.layer_unpacker import LayerUnpacker
from lazysnap.paths import Root
from lazysnap.registry.client import Registry
from lazysnap.registry.hosts import RegistrySettings
from lazysnap.shard.settings import ShardSettings, read_settings, write_settings
from lazysnap.snapshotter.interfaces import Unpacker
from lazysnap.snapshotter.snapshotter import Snapshotter
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor
from lazysnap.unpack.applier_pool import ApplierPool

T = TypeVar("T")

# Each is a process, and one serves the readers of a directory well.
_SHARDS = 1


@dataclass(frozen=True)
class Engine:
    """The parts that a command works with.

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
        settings: of that client; added to the settings of shards.
        work: called when everything is as the database says.
        find_profiles: look for start-up profiles beside images.

    Raises:
        LazysnapError: what `work` raises, or the snapshotter when it starts.
    """
    changed = _write_settings(root, settings)
    supervisor = new_supervisor(root)
    cache = Cache(Root(root).cache.path)
    outcome: list[T] = []
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            parts = Parts(
                store=store,
                cache=cache,
                supervisor=supervisor,
                registry=registry,
                layer_mounts=_layer_mounts(cache, supervisor),
                nursery=nursery,
            )
            # Nothing here has to survive a power cut, as no mount does: so nothing is synced.
            options = Options(find_profiles=find_profiles, sync_on_commit=False)
            outcome.append(await _work(parts, options, work, reload=changed))
        except Exception as error:  # raised outside, where it is not wrapped into a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome[0]


async def _work(
    parts: Parts, options: Options, work: Callable[[Engine], Awaitable[T]], *, reload: bool
) -> T:
    snapshotter = assemble(options, parts).snapshotter
    async with snapshotter.running(parts.nursery):
        if reload:
            await parts.supervisor.ask_all(lambda each: each.reload())
        unpacker = LayerUnpacker(parts.registry, ApplierPool(os.cpu_count() or 1))
        outcome = await work(Engine(snapshotter, unpacker, parts.supervisor))
        await snapshotter.cleanup()
        return outcome


def _write_settings(root: str, settings: RegistrySettings) -> bool:
    """Write the settings of workers; returns whether they have changed."""
    known = read_settings(root)
    hosts = known.registry.plain_http_hosts | settings.plain_http_hosts
    wanted = ShardSettings(
        registry=replace(settings, plain_http_hosts=hosts), log_level="warning", background=False
    )
    write_settings(root, wanted)
    return wanted != known


def _layer_mounts(cache: Cache, supervisor: Supervisor) -> LayerMounts:
    if os.geteuid() == 0:
        return KernelTreeMounts(cache, supervisor, kernel_trees=True)
    return ShardDirectories(supervisor)
