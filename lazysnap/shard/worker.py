# SPDX-License-Identifier: Apache-2.0
"""The worker of a shard: serves the FUSE session that the keeper holds, until it is told to end.

The keeper forks it (see there). It may be killed at any moment: all that it knows is on disk, so the
next one goes on. Beside FUSE it serves the control socket `shards/<n>.sock`, with the calls of
`WorkerCalls`.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from functools import partial

import pyfuse3
import trio

import lazysnap
from lazysnap import channel, log, tracing
from lazysnap.advice import advice
from lazysnap.cache import Cache
from lazysnap.cache.eviction import Evictor
from lazysnap.errors import LazysnapError
from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.open_files import OpenFiles
from lazysnap.fetch.scheduler import Priority, Scheduler
from lazysnap.fetch.trace import Told
from lazysnap.layers.in_use import names_in_use
from lazysnap.layers.slots import LayerOrigin
from lazysnap.paths import Root
from lazysnap.prefetch.profile import Read
from lazysnap.prefetch.queue import PrefetchQueue
from lazysnap.prefetch.readahead import prepare_tree
from lazysnap.registry.client import Blob, Registry
from lazysnap.shard import memory, reporting
from lazysnap.shard.blobs import WholeBlobs
from lazysnap.shard.cache_upkeep import CacheUpkeep, keep_within_limits, watch_objects
from lazysnap.shard.calls import (
    Health,
    HealthState,
    LayerStatus,
    Loaded,
    Metrics,
    PackedReads,
    Who,
    WorkerCalls,
    handlers,
)
from lazysnap.shard.expecting import expect, shown
from lazysnap.shard.health import LayerHealth
from lazysnap.shard.idle import IdleTime
from lazysnap.shard.layer_sources import LayerSources, drain, prefetch
from lazysnap.shard.library_prefetch import LibraryPrefetch
from lazysnap.shard.mounted_layers import MountedLayer, MountedLayers
from lazysnap.shard.operations import Operations
from lazysnap.shard.read_recording import ReadRecording
from lazysnap.shard.served_layer import ServedLayer
from lazysnap.shard.settings import ShardSettings, read_settings, serves_xattrs
from lazysnap.shard.store_operations import StoreOperations
from lazysnap.shard.store_view import StoreView

_log = log.get(__name__)
# Kept between releases, see `lazysnap.shard`; the keeper has them, too.
EXIT_UNMOUNTED = 0
EXIT_RESTART = 75
_DESCRIPTORS = 1 << 16
# How long a use waits, at most, until all objects in the cache have been examined.
_CHECKED_SECONDS = 2.0


class Worker(WorkerCalls):
    """One worker.

    Args:
        root: lazysnap's root directory.
        number: of the shard.
        settings: what the daemon wrote.
        registry: client for blobs.
        nursery: where fetching happens.
    """

    def __init__(
        self,
        root: str,
        number: int,
        settings: ShardSettings,
        registry: Registry,
        nursery: trio.Nursery,
    ) -> None:
        self.root = root
        self.number = number
        self.settings = settings
        self.cache = Cache(Root(root).cache.path)
        self.evictor = Evictor(self.cache, settings.cache, partial(names_in_use, root))
        self.contents = OpenFiles(self.cache, evictor=self.evictor)
        self.scheduler = Scheduler(settings.limits)
        self.ahead = PrefetchQueue(self.scheduler, nursery, IdleTime(self.evictor).wait)
        self._decoders = trio.CapacityLimiter(settings.decode_threads)
        self.scheduler.leave_to_readers(settings.decode_threads)
        sources = LayerSources(
            registry=registry,
            cache=self.cache,
            contents=self.contents,
            scheduler=self.scheduler,
            ahead=self.ahead,
            nursery=nursery,
            decoders=self._decoders,
        )
        self.layers = MountedLayers(root, number, sources.make)
        self.libraries = LibraryPrefetch(self.layers, self.ahead, nursery)
        self.restarting = trio.CancelScope()
        self._registry = registry
        self._nursery = nursery
        self._health = LayerHealth(self.cache, settings)
        watch = watch_objects(self.cache)
        self.recording = ReadRecording(self.layers, self.cache, watch, nursery)
        self.upkeep = CacheUpkeep(
            self.contents,
            settings.seal_seconds,
            watch,
            self.recording.hold,
            self.recording.opened,
        )
        self._started = time.monotonic()
        self.store_view = StoreView(root) if settings.named else None

    def operations(self) -> Operations:
        """The handlers of FUSE requests."""
        if self.store_view is None:
            return Operations(self.layers, self.root, xattrs=serves_xattrs(self.root, self.number))
        return StoreOperations(
            self.layers, self.root, self.store_view, WholeBlobs(self.root, self._blob)
        )

    async def _blob(self, slot: int) -> Blob:
        return (await self.layers.load(slot)).served.blob

    async def ping(self) -> Who:
        """Tell who serves this shard."""
        return Who(
            pid=os.getpid(),
            keeper=os.getppid(),
            version=lazysnap.__version__,
            shard=self.number,
            uptime_seconds=time.monotonic() - self._started,
            requests=reporting.requests(),
        )

    async def expect(self, layer: LayerOrigin, reads: PackedReads = ()) -> None:
        """Begin to fetch ahead of a layer that no slot shows yet.

        If no slot shows it soon, its reader is given up again; what was fetched is in the cache.
        """
        self._nursery.start_soon(expect, self.layers, self.cache, layer, reads)

    async def attach(self, slot: int, reads: PackedReads = (), reachable: bool = False) -> Loaded:
        """Load a slot, so that errors show now and not to a reader, and begin to fetch ahead."""
        layer = await self.layers.load(slot)
        if reachable:
            layer.served.blob.note_success()
        begun = shown(layer.served, reads)
        # The caller need not wait until a long profile has been understood.
        self._nursery.start_soon(self._prefetch, layer, None if begun else reads)
        self._fetch_all(layer.served)
        return Loaded(layer.index.node_count)

    async def _prefetch(self, layer: MountedLayer, reads: PackedReads | None) -> None:
        """Read what a start needs from the disk, and fetch the rest of it unless that has begun.

        Args:
            layer: of the slot.
            reads: of a profile; None if they are being fetched already.
        """
        with advice(_log, "fetching ahead failed", layer=layer.record.layer_digest):
            await trio.to_thread.run_sync(prepare_tree, self.cache, layer.record)
            if reads is not None:
                await prefetch(layer.served, self.cache, reads)

    def _fetch_all(self, layer: ServedLayer) -> None:
        """Fetch the whole layer when nothing else is to be done, if that is wanted."""
        if self.settings.background and not layer.fetches_all():
            everything = Plan(range(layer.index.member_count))
            delay = self.settings.background_delay_seconds
            done = layer.fetch_ahead(everything, Priority.BACKGROUND, delay_seconds=delay)
            self._nursery.start_soon(self._find_complete, layer, done)

    async def _find_complete(self, layer: ServedLayer, done: trio.Event) -> None:
        """Look for each file of a layer as soon as all are fetched, so that no start has to."""
        await done.wait()
        try:
            if not layer.closed:
                await self._health.find_complete(layer)
        except LazysnapError as error:
            _log.debug(
                "completeness of a layer is not known", layer=layer.origin.layer_digest, error=error
            )

    async def resume(self) -> None:
        """Go on fetching in the background where an earlier worker ended."""
        if not self.settings.background:
            return
        for slot in self.layers.slots():
            try:
                self._fetch_all((await self.layers.load(slot)).served)
            except LazysnapError as error:
                _log.debug("slot not resumed", slot=slot, error=error)
            except Exception:  # one bad layer must not end the worker, again and again
                _log.exception("slot not resumed", slot=slot)

    async def detach(self, slots: Sequence[int], reload: bool = False) -> None:
        """Let go of slots.

        The directories of those to be loaded again stay what they are: the kernel cannot bind a
        directory that it was told to forget.
        """
        for slot in slots:
            self.layers.forget(slot)
            if not reload:
                place = (
                    self.store_view.forget(slot)
                    if self.store_view
                    else (pyfuse3.ROOT_INODE, b"%d" % slot)
                )
                if place is not None:
                    pyfuse3.invalidate_entry_async(*place, deleted=0, ignore_enoent=True)

    async def health(self, slots: Sequence[int]) -> dict[int, Health]:
        """Find out whether slots can be read."""
        result: dict[int, Health] = {}
        with trio.move_on_after(_CHECKED_SECONDS):
            await self.upkeep.checked.wait()

        async def look(slot: int) -> None:
            try:
                layer = await self.layers.load(slot)
                result[slot] = await self._health.look(layer.served)
            except LazysnapError as error:
                result[slot] = Health(HealthState.FAILED, str(error))
            except Exception as error:  # one bad layer must not hide the state of the others
                _log.exception("health of a layer is not known", slot=slot)
                result[slot] = Health(HealthState.FAILED, repr(error))

        async with trio.open_nursery() as nursery:
            for slot in slots:
                nursery.start_soon(look, slot)
        return result

    async def status(self, slots: Sequence[int] | None = None) -> list[LayerStatus]:
        """Tell numbers of slots, or of all that are loaded."""
        chosen = self.layers.slots_loaded() if slots is None else slots
        layers = [await self.layers.load(slot) for slot in chosen]
        return [await reporting.layer_status(each, self.cache, self.number) for each in layers]

    async def metrics(self) -> Metrics:
        """Tell what this process has counted."""
        return reporting.metrics(self._registry, self._started)

    async def link(self, slot: int, node: int) -> None:
        """Fetch what loading a program or library reads."""
        await self.libraries.link(slot, node)

    async def drain(self, slots: Sequence[int]) -> None:
        """Begin to fetch all of some slots now."""
        for slot in slots:
            drain((await self.layers.load(slot)).served)

    async def record(self, slots: Sequence[int], since: float, fresh: bool = False) -> None:
        """Begin to note what is read."""
        await self.recording.record(slots, since, fresh)

    async def recorded(self, slots: Sequence[int], since: float) -> dict[str, list[Read]]:
        """End `record`; what was read, by layer digest."""
        self.upkeep.look()  # also what was opened a moment ago
        return await self.recording.recorded(slots, since)

    async def trace(self, slots: Sequence[int], since: float = 0.0) -> list[Told]:
        """Tell what was fetched for slots, and who waited."""
        found = [(slot, self.layers.get(slot)) for slot in slots]
        return reporting.trace(found, since, self._started, self.scheduler)

    async def reload(self) -> int:
        """Take up the settings that are on disk now; our process id."""
        before = self.settings
        self.settings = settings = read_settings(self.root)
        log.setup(settings.log_level, settings.log_format)
        self.evictor.apply(settings.cache)
        self.scheduler.apply(settings.limits)
        self._registry.apply(settings.registry)
        self._decoders.total_tokens = settings.decode_threads
        self.scheduler.leave_to_readers(settings.decode_threads)
        self._health.settings = settings
        if before.background and not settings.background:
            self.ahead.drop_all(Priority.BACKGROUND)
        elif settings.background and not before.background:
            self._nursery.start_soon(self.resume)
        _log.info("settings reloaded", shard=self.number)
        return os.getpid()

    async def restart(self) -> None:
        """End soon; the keeper starts another worker."""

        async def later() -> None:
            await trio.sleep(0.05)  # until the answer to this call is out
            self.restarting.cancel()

        self._nursery.start_soon(later)


async def _main(target: pyfuse3.Operations, root: str, number: int) -> int:
    memory.keep_freed()
    settings = read_settings(root)
    log.setup(settings.log_level, settings.log_format)
    status = EXIT_RESTART
    async with Registry(settings.registry) as registry, trio.open_nursery() as nursery:
        worker = Worker(root, number, settings, registry, nursery)
        worker.operations().install(target)
        socket_path = Root(root).shard_socket(number)
        await nursery.start(channel.serve, socket_path, handlers(worker))
        nursery.start_soon(worker.upkeep.run)
        nursery.start_soon(worker.layers.tidy)
        nursery.start_soon(keep_within_limits, worker.contents, worker.evictor)
        nursery.start_soon(worker.resume)
        _log.info("worker serves", shard=number, pid=os.getpid(), version=lazysnap.__version__)
        with worker.restarting:
            await pyfuse3.main(min_tasks=4, max_tasks=settings.max_requests)
            status = EXIT_UNMOUNTED
        nursery.cancel_scope.cancel()
    return status


def _raise_descriptor_limit() -> None:
    """Ask for as many descriptors as open contents can use; systemd's default is only 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(target: pyfuse3.Operations, root: str, number: int) -> int:
    """Serve until the file system is unmounted or `restart` is called.

    A keeper of an earlier release calls this, see "Kept between releases" in `lazysnap.shard`.

    Args:
        target: the object whose attributes pyfuse3 calls.
        root: lazysnap's root directory.
        number: of the shard.

    Returns:
        The exit status that the keeper understands.
    """
    _raise_descriptor_limit()
    tracing.setup()
    status: int = trio.run(_main, target, root, number)
    tracing.end()
    return status
