# SPDX-License-Identifier: Apache-2.0
"""The daemon of the additional layer store: puts all parts together and runs until it is told to stop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial

import msgspec
import trio

import lazysnap
from lazysnap import atomic_files, channel, log, monitor, watchdog
from lazysnap.cache import Cache
from lazysnap.config import Config
from lazysnap.errors import Internal, LazysnapError
from lazysnap.filesystem.assembly import Options, Parts, assemble
from lazysnap.filesystem.layer_mounts import NoMounts
from lazysnap.layerstore.images import Images
from lazysnap.layerstore.kernel_trees import KernelTrees
from lazysnap.layerstore.layers import LayerStore
from lazysnap.layerstore.references import References
from lazysnap.layerstore.storages import Storages
from lazysnap.paths import Root
from lazysnap.registry.client import Registry
from lazysnap.reloading import Reload, run_until_stopped
from lazysnap.root import introduce, lock_root
from lazysnap.settings import registry_settings, shard_settings
from lazysnap.shard.settings import ShardSettings, write_settings
from lazysnap.snapshotter.snapshotter import Snapshotter
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
_COLLECT_SECONDS = 60.0
# Clients tell that they are done with a layer just before they remove it from their storage.
_SETTLE_SECONDS = 1.0
_FORGOTTEN_SECONDS = 0.02
# A client's path of a layer leads to one mount.
_SHARDS = 1


async def run(load: Callable[[], Config], *, unmount_on_exit: bool, shard_slice: str = "") -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        load: reads the configuration; called again at SIGHUP. Its sections of lazy layers, shards,
            fetching, registries and cache count, and where metrics are served.
        unmount_on_exit: take down the mount when stopping; containers that use it break.
        shard_slice: see `Supervisor`.

    Raises:
        ConfigError: another daemon uses the root, or it cannot be used.
        LazysnapError: something that is needed does not work.
    """
    config = load()
    root = os.path.realpath(config.root)
    os.umask(0o022)
    lock = lock_root(root, "store")
    try:
        introduce(root, Root(root).store_socket)
        await run_until_stopped(partial(_serve, config, root, unmount_on_exit, shard_slice), load)
    finally:
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
        _SHARDS,
        max_background=config.shards.max_background,
        read_ahead_kib=config.shards.read_ahead_kib,
        slice_name=shard_slice,
        writable=True,
    )
    _make_path(root)
    store = SnapshotStore(Root(root).database)
    try:
        async with Registry(registry_settings(config)) as registry, trio.open_nursery() as nursery:
            cache = Cache(Root(root).cache.path)
            trees = KernelTrees(cache, supervisor, enabled=config.lazy.kernel_trees)
            parts = Parts(
                store=store,
                cache=cache,
                supervisor=supervisor,
                registry=registry,
                layer_mounts=NoMounts(root, tree_images=trees.possible),
                nursery=nursery,
            )
            snapshotter = assemble(_options(config), parts).snapshotter
            async with snapshotter.running(nursery):
                nursery.start_soon(supervisor.watch)
                await monitor.start(nursery, supervisor, registry, config.metrics_address)
                await trio.to_thread.run_sync(trees.start)
                await _serve_layers(root, snapshotter, Images(registry), trees, nursery)
                _log.info("ready", store=Root(root).store, version=lazysnap.__version__)
                nursery.start_soon(watchdog.run, snapshotter.answers)
                task_status.started(
                    Reload(config, root, registry, supervisor, _settings_for_shards)
                )
                await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            if unmount_on_exit:
                await supervisor.stop()
        store.close()


def _options(config: Config) -> Options:
    return Options(
        allow_unverified=config.lazy.allow_unverified,
        find_profiles=config.fetch.find_profiles,
    )


def _settings_for_shards(config: Config) -> ShardSettings:
    """What the worker of the shard reads of the configuration."""
    return msgspec.structs.replace(shard_settings(config, _SHARDS), named=True)


async def _serve_layers(
    root: str,
    snapshotter: Snapshotter,
    images: Images,
    trees: KernelTrees,
    nursery: trio.Nursery,
) -> None:
    """Begin to answer workers, and to remove layers that nobody uses any more."""
    wakes, waits = trio.open_memory_channel[None](1)

    def expect_garbage() -> None:
        with contextlib.suppress(trio.WouldBlock):
            wakes.send_nowait(None)

    references = References(Storages(root), nursery, expect_garbage)
    layers = LayerStore(root, snapshotter, images, references, trees)
    await layers.start()

    async def find(reference: str, digest: str) -> int:
        slot = await layers.find(reference, digest)
        # In a task, as the path that something is mounted on is only there when this was answered.
        nursery.start_soon(layers.show_trees)
        return slot

    async def released(slot: int, pid: int) -> None:
        await layers.released(slot, pid)
        expect_garbage()
        nursery.start_soon(show_again)

    async def show_again() -> None:
        # The kernel forgets a path, and what is mounted there, when removing it fails with ENOENT.
        await trio.sleep(_FORGOTTEN_SECONDS)
        await layers.show_trees()

    handlers = {
        "find": find,
        "used": layers.used,
        "released": released,
        "collect": layers.collect,
    }
    await nursery.start(channel.serve, Root(root).store_socket, handlers)
    await layers.show_trees()
    nursery.start_soon(_collect, layers, waits)


async def _collect(layers: LayerStore, waits: trio.MemoryReceiveChannel[None]) -> None:
    """Remove unused layers for ever: now and then, and soon after some are expected."""
    while True:
        with trio.move_on_after(_COLLECT_SECONDS):
            await waits.receive()
            await trio.sleep(_SETTLE_SECONDS)
        try:
            await layers.collect()
            await layers.show_trees()  # of a shard that was mounted anew
        except LazysnapError as error:
            _log.warning("unused layers are not removed", error=error)


def _make_path(root: str) -> None:
    """Make the path for clients, which is there from now on, also while nothing is mounted.

    A client that does not find the path refuses all work, not only work with lazy layers.
    """
    path = Root(root).store
    target = Root(root).store_layers
    with contextlib.suppress(OSError):  # a mount that is dead; the directory is below it
        os.makedirs(target, exist_ok=True)
    try:
        if os.path.islink(path) and os.readlink(path) == target:
            return
        atomic_files.replace_link(path, target)
    except OSError as error:
        raise Internal(f"cannot make {path}: {error.strerror}") from error
