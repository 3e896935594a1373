# SPDX-License-Identifier: Apache-2.0
"""The daemon: builds all parts, puts them together, and runs them until it is told to stop."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket

import sdnotify
import trio

import lazysnap
from lazysnap import log, mounts, service
from lazysnap.cache import Cache
from lazysnap.cache.eviction import CacheLimits
from lazysnap.config import Config
from lazysnap.errors import ConfigError, LazysnapError
from lazysnap.layers.builders import Builders
from lazysnap.layers.opener import Opener
from lazysnap.layers.schedule import Limits
from lazysnap.registry.client import Registry
from lazysnap.registry.hosts import RegistrySettings
from lazysnap.shard.settings import ShardSettings, write_settings
from lazysnap.snapshotter.finder import ProfileFinder
from lazysnap.snapshotter.learner import Learner
from lazysnap.snapshotter.shard_layers import ShardLayers
from lazysnap.snapshotter.showing import Showing
from lazysnap.snapshotter.snapshotter import Settings, Snapshotter
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)


async def run(config: Config, *, unmount_on_exit: bool) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: the configuration.
        unmount_on_exit: take down mounts and shards when stopping. Otherwise containers go on
            reading, and the next daemon finds everything as it is.

    Raises:
        ConfigError: another daemon uses the root or the socket, or they cannot be used.
        LazysnapError: something that is needed does not work.
    """
    # What the kernel says of mounts is compared with paths, so there must be no links in them.
    root = os.path.realpath(config.root)
    os.umask(0o022)  # directories of snapshots become "/" of containers
    lock = _lock_root(root)
    try:
        _check_address(config.address)
        _introduce(root, config.address)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    async for number in signals:
                        _log.info("stopping", signal=signal.Signals(number).name)
                        break
                    sdnotify.SystemdNotifier().notify("STOPPING=1")
                    nursery.cancel_scope.cancel()

                nursery.start_soon(stop)  # also while starting, which can take long
                await nursery.start(_serve, config, root, unmount_on_exit)
                sdnotify.SystemdNotifier().notify("READY=1")
    except ExceptionGroup as group:
        error: Exception = group
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, LazysnapError):
            raise error from group  # the command line knows what to say of it
        raise
    finally:
        os.close(lock)


async def _serve(
    config: Config,
    root: str,
    unmount_on_exit: bool,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    registry_settings = RegistrySettings(
        plain_http_hosts=frozenset(config.registry.plain_http_hosts),
        retry_seconds=config.registry.retry_seconds,
        stall_seconds=config.registry.stall_seconds,
    )
    write_settings(
        root,
        ShardSettings(
            registry=registry_settings,
            cache=CacheLimits(
                size_limit_bytes=config.cache.size_limit_bytes,
                reserve_bytes=config.cache.reserve_bytes,
                reserve_percent=config.cache.reserve_percent,
            ),
            log_level=config.log_level,
            log_format=config.log_format,
            decode_threads=config.shards.decode_threads,
            limits=_limits(config),
            background=config.fetch.background,
            background_delay_seconds=config.fetch.background_delay_seconds,
            probe_valid_seconds=config.registry.probe_valid_seconds,
        ),
    )
    cache = Cache(os.path.join(root, "cache"))
    supervisor = Supervisor(
        root,
        config.shard_count(),
        max_background=config.shards.max_background,
        read_ahead_kib=config.shards.read_ahead_kib,
    )
    store = SnapshotStore(os.path.join(root, "metadata.db"))
    builders = Builders(os.cpu_count() or 1)
    try:
        async with Registry(registry_settings) as registry, trio.open_nursery() as nursery:
            nursery.start_soon(builders.run)
            showing = Showing(cache, supervisor, kernel_trees=config.lazy.kernel_trees)
            opener = Opener(
                cache.index,
                registry,
                builders,
                allow_unverified=config.lazy.allow_unverified,
                trees=cache.trees if showing.composing else "",
            )
            user_namespace = mounts.overlay_facts().user_namespace
            layers = ShardLayers(
                root,
                supervisor,
                opener,
                nursery,
                Learner(
                    root,
                    supervisor,
                    enabled=config.fetch.learn_profiles,
                    seconds=config.fetch.learn_seconds,
                ),
                ProfileFinder(root, registry, enabled=config.fetch.find_profiles),
                showing,
                b"user.overlay.opaque" if user_namespace else b"trusted.overlay.opaque",
            )
            snapshotter = Snapshotter(
                root,
                store,
                settings=Settings(sync_on_commit=config.snapshots.sync_on_commit),
                remote=layers if config.lazy.enabled else None,
            )
            await snapshotter.start(nursery)
            nursery.start_soon(supervisor.watch)
            await nursery.start(service.serve, snapshotter, config.address)
            _log.info("ready", address=config.address, root=root, version=lazysnap.__version__)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await snapshotter.aclose()
    finally:
        with trio.CancelScope(shield=True):
            if unmount_on_exit:
                await _unmount(root, supervisor)
        store.close()


def _limits(config: Config) -> Limits:
    """The limits of one shard; those on bytes are shared out."""
    shards = config.shard_count()
    return Limits(
        connections=config.fetch.connections,
        bytes_per_second=-(-config.fetch.bytes_per_second // shards),
        host_bytes_per_second=-(-config.fetch.host_bytes_per_second // shards),
    )


def _introduce(root: str, address: str) -> None:
    """Say in `daemon.json` who serves the root; it counts as long as `lock` is held."""
    path = os.path.join(root, "daemon.json")
    facts = {"pid": os.getpid(), "version": lazysnap.__version__, "address": address}
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(facts, file)
        os.rename(f"{path}.new", path)
    except OSError as error:
        _log.warning("cannot write who serves the root", path=path, error=error)


async def _unmount(root: str, supervisor: Supervisor) -> None:
    try:
        await trio.to_thread.run_sync(mounts.unmount_below, os.path.join(root, "snapshots"))
    except LazysnapError as error:
        _log.error("a snapshot stays mounted", error=error)
    await supervisor.stop()


def _check_address(address: str) -> None:
    """Refuse a socket that somebody answers at, before anything is started for it."""
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


def _lock_root(root: str) -> int:
    """Make sure that no other daemon uses the root; held as long as the descriptor is open."""
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        fd = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the root {root} cannot be used: {error.strerror}",
            hint="lazysnap serve must run as root; choose another directory with --root",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConfigError(
            f"another lazysnap serve uses {root}",
            hint="stop it first (systemctl stop lazysnap), or choose another --root",
        ) from error
    return fd
