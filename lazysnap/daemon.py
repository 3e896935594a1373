# SPDX-License-Identifier: Apache-2.0
"""The daemon: builds all parts, puts them together, and runs them until it is told to stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial

import trio

import lazysnap
from lazysnap import channel, log, monitor, mounts, service, tracing, watchdog
from lazysnap.cache import Cache
from lazysnap.config import Config
from lazysnap.errors import ConfigError, LazysnapError
from lazysnap.filesystem.assembly import Assembly, Options, Parts, assemble
from lazysnap.filesystem.kernel_tree_mounts import KernelTreeMounts
from lazysnap.paths import Root
from lazysnap.pull.daemon_server import Delegated
from lazysnap.registry.client import Registry
from lazysnap.reloading import Reload, run_until_stopped
from lazysnap.root import introduce, lock_root
from lazysnap.settings import registry_settings, shard_settings
from lazysnap.shard.settings import ShardSettings, write_settings
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)


async def run(load: Callable[[], Config], *, unmount_on_exit: bool, shard_slice: str = "") -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        load: reads the configuration; called again at SIGHUP.
        unmount_on_exit: take down mounts and shards when stopping. Otherwise containers go on
            reading, and the next daemon finds everything as it is.
        shard_slice: see `Supervisor`.

    Raises:
        ConfigError: another daemon uses the root or the socket, or they cannot be used.
        LazysnapError: something that is needed does not work.
    """
    config = load()
    # What the kernel says of mounts is compared with paths, so there must be no links in them.
    root = os.path.realpath(config.root)
    tracing.setup()
    os.umask(0o022)  # directories of snapshots become "/" of containers
    lock = lock_root(root, "serve")
    try:
        _check_address(config.address)
        introduce(root, config.address)
        await run_until_stopped(partial(_serve, config, root, unmount_on_exit, shard_slice), load)
    finally:
        tracing.end()
        os.close(lock)


async def _serve(
    config: Config,
    root: str,
    unmount_on_exit: bool,
    shard_slice: str,
    *,
    task_status: trio.TaskStatus[Reload] = trio.TASK_STATUS_IGNORED,
) -> None:
    write_settings(root, _settings_for_shards(config))
    supervisor = Supervisor(
        root,
        config.shard_count(),
        max_background=config.shards.max_background,
        read_ahead_kib=config.shards.read_ahead_kib,
        slice_name=shard_slice,
    )
    store = SnapshotStore(Root(root).database)
    try:
        async with Registry(registry_settings(config)) as registry, trio.open_nursery() as nursery:
            cache = Cache(Root(root).cache.path)
            kernel_trees = config.lazy.kernel_trees
            parts = Parts(
                store=store,
                cache=cache,
                supervisor=supervisor,
                registry=registry,
                layer_mounts=KernelTreeMounts(cache, supervisor, kernel_trees=kernel_trees),
                nursery=nursery,
            )
            assembly = assemble(_options(config), parts)
            async with assembly.snapshotter.running(nursery):
                nursery.start_soon(supervisor.watch)
                await monitor.start(nursery, supervisor, registry, config.metrics_address)
                await _serve_clients(config, root, assembly, registry, nursery)
                _log.info("ready", address=config.address, root=root, version=lazysnap.__version__)
                task_status.started(
                    Reload(config, root, registry, supervisor, _settings_for_shards)
                )
                await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            if unmount_on_exit:
                await _unmount(root, supervisor)
        store.close()


async def _serve_clients(
    config: Config, root: str, assembly: Assembly, registry: Registry, nursery: trio.Nursery
) -> None:
    """Begin to answer commands and containerd."""
    if config.lazy.enabled:
        telling = {"pull": Delegated(registry, assembly.open_ahead).pull}
        path = Root(root).daemon_socket
        await nursery.start(partial(channel.serve, path, {}, telling=telling))
    await nursery.start(service.serve, assembly.snapshotter, config.address)
    nursery.start_soon(watchdog.run, assembly.snapshotter.answers)


def _options(config: Config) -> Options:
    return Options(
        lazy=config.lazy.enabled,
        allow_unverified=config.lazy.allow_unverified,
        unpack=config.snapshots.eager != "containerd",
        find_profiles=config.fetch.find_profiles,
        learn_profiles=config.fetch.learn_profiles,
        learn_seconds=config.fetch.learn_seconds,
        fetch_ahead=True,
        builders_kept=1,
        sync_on_commit=config.snapshots.sync_on_commit,
    )


def _settings_for_shards(config: Config) -> ShardSettings:
    """What workers of shards read of the configuration."""
    return shard_settings(config, config.shard_count())


async def _unmount(root: str, supervisor: Supervisor) -> None:
    try:
        for directory in (Root(root).merged, Root(root).snapshots):
            await trio.to_thread.run_sync(mounts.unmount_below, directory)
    except LazysnapError as error:
        _log.error("a snapshot stays mounted", error=error)
    await supervisor.stop()


def _check_address(address: str) -> None:
    """Refuse a socket at which another process answers, before anything is started for it."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.settimeout(1)
            probe.connect(address)
        except OSError:
            return
    raise ConfigError(
        f"something already serves at {address}",
        hint="stop the other lazysnap, or give this one another socket with --address",
    )
