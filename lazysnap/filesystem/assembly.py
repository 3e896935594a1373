# SPDX-License-Identifier: Apache-2.0
"""Puts a snapshotter and its file system of lazy layers together, for all programs that need one.

The daemon, the additional layer store and standalone mounts use the same parts in the same way. They differ
in `Options`, and in how layers become visible (see `layer_mounts`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from lazysnap import mounts
from lazysnap.cache import Cache
from lazysnap.filesystem.fetch_ahead import FetchAhead
from lazysnap.filesystem.layer_mounts import LayerMounts
from lazysnap.filesystem.layer_unpacker import LayerUnpacker
from lazysnap.filesystem.open_ahead import OpenAhead
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.filesystem.profile_learner import ProfileLearner
from lazysnap.filesystem.shard_filesystem import ShardFilesystem
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.opener import Opener, may_be_lazy
from lazysnap.registry.client import Registry
from lazysnap.snapshotter.snapshotter import Settings, Snapshotter
from lazysnap.snapshotter.unpack_ahead import AT_ONCE
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor
from lazysnap.unpack.applier_pool import ApplierPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """In what the programs differ. By default everything is off that only the daemon does.

    Attributes:
        lazy: mount layers lazily at all.
        allow_unverified: also those for which no digest of the table of contents is known.
        unpack: unpack layers that are not lazy; otherwise the client does.
        find_profiles: ask the registry for start-up profiles.
        learn_profiles: make profiles by watching starts; profiles that are there are used anyway.
        learn_seconds: how long a start is watched.
        fetch_ahead: have shards fetch for a start before its layers are mounted.
        builders_kept: how many processes that build indexes are kept ready.
        sync_on_commit: wait at each commit until the disk has everything.
    """

    lazy: bool = True
    allow_unverified: bool = False
    unpack: bool = False
    find_profiles: bool
    learn_profiles: bool = False
    learn_seconds: float = 0.0
    fetch_ahead: bool = False
    builders_kept: int = 0
    sync_on_commit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What each program makes by itself, as it needs it for more than a snapshotter.

    Attributes:
        store: the database of the root.
        cache: of the root.
        supervisor: of the root's shards.
        registry: client.
        layer_mounts: makes layers visible.
        nursery: where background work runs.
    """

    store: SnapshotStore
    cache: Cache
    supervisor: Supervisor
    registry: Registry
    layer_mounts: LayerMounts
    nursery: trio.Nursery


@dataclass(frozen=True, slots=True)
class Assembly:
    """What was put together.

    Attributes:
        snapshotter: not started yet.
        open_ahead: opens the layers of images before they are asked for.
    """

    snapshotter: Snapshotter
    open_ahead: OpenAhead


def assemble(options: Options, parts: Parts) -> Assembly:
    """Put a snapshotter together.

    Args:
        options: of the program.
        parts: of the program.

    Raises:
        ConfigError: the root cannot be used.
        Internal: the root cannot be made.
    """
    root, supervisor, nursery = parts.supervisor.root, parts.supervisor, parts.nursery
    opener = _opener(options, parts)
    finder = ProfileFinder(root, parts.registry, enabled=options.find_profiles)
    learner = ProfileLearner(
        root, supervisor, enabled=options.learn_profiles, seconds=options.learn_seconds
    )
    opened = None
    # Otherwise a layer's shard is not known in time: it depends on what the index says of xattrs.
    if options.fetch_ahead and parts.layer_mounts.capabilities.any_shard:
        opened = FetchAhead(supervisor, finder, learner, nursery).opened
    open_ahead = OpenAhead(parts.registry, opener, finder, nursery, opened)
    filesystem = ShardFilesystem(
        supervisor=supervisor,
        opener=opener,
        open_ahead=open_ahead,
        finder=finder,
        learner=learner,
        layer_mounts=parts.layer_mounts,
        opaque_xattr=mounts.overlay_facts().opaque_xattr,
        nursery=nursery,
    )
    snapshotter = Snapshotter(
        root,
        parts.store,
        settings=Settings(sync_on_commit=options.sync_on_commit),
        filesystem=filesystem if options.lazy else None,
        unpacker=_unpacker(options, parts.registry) if options.unpack else None,
    )
    return Assembly(snapshotter, open_ahead)


def _opener(options: Options, parts: Parts) -> Opener:
    builders = BuilderPool(os.cpu_count() or 1, kept=options.builders_kept)
    parts.nursery.start_soon(builders.run)
    return Opener(
        parts.cache.index,
        parts.registry,
        builders,
        allow_unverified=options.allow_unverified,
        trees=parts.cache.trees if parts.layer_mounts.capabilities.tree_images else "",
    )


def _unpacker(options: Options, registry: Registry) -> LayerUnpacker:
    def maybe(annotations: Mapping[str, str]) -> bool:
        return options.lazy and may_be_lazy(annotations, allow_unverified=options.allow_unverified)

    return LayerUnpacker(registry, ApplierPool((os.cpu_count() or 1) + AT_ONCE), maybe)
