# SPDX-License-Identifier: Apache-2.0
"""What a worker reports: counts for the daemon's metrics, and the state of its layers for people.

Changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import msgspec
import trio

from lazysnap.cache import Cache
from lazysnap.fetch.coverage import local_share
from lazysnap.fetch.scheduler import Scheduler
from lazysnap.fetch.trace import Told, forgotten
from lazysnap.metrics import families
from lazysnap.metrics.counts import Sample, counts
from lazysnap.registry.client import Registry
from lazysnap.shard.activity import activity
from lazysnap.shard.calls import LayerStatus, Metrics
from lazysnap.shard.mounted_layers import MountedLayer

HUNG_SECONDS = 30.0
"""A read that waits longer counts as hung."""


def registry_sample(registry: Registry) -> Sample:
    """What a registry client has counted."""
    statistics = registry.statistics()
    return {
        families.REGISTRY_REQUESTS: {"": [statistics.requests]},
        families.REGISTRY_BYTES: {"": [statistics.bytes_received]},
        families.REGISTRY_RETRIES: {"": [statistics.retries]},
    }


def metrics(registry: Registry, started: float) -> Metrics:
    """Everything that was counted since this process was started.

    Args:
        registry: the process's client.
        started: when it was started, by time.monotonic().
    """
    now = time.monotonic()
    waited = [now - since for since in activity.waiting.values()]
    return Metrics(
        process=f"{os.getpid()}@{started}",
        started=started,
        sample=counts.sample() | registry_sample(registry),
        gauges={
            families.READS_IN_FLIGHT: len(waited),
            families.READS_HUNG: sum(seconds > HUNG_SECONDS for seconds in waited),
            families.WORKER_MEMORY: _resident_bytes(),
        },
    )


def requests() -> dict[str, int]:
    """How many requests of each kind the kernel has made."""
    found = counts.sample().get(families.FUSE_SECONDS, {})
    return {name: int(sum(numbers[:-1])) for name, numbers in found.items() if any(numbers)}


async def layer_status(layer: MountedLayer, cache: Cache, shard: int) -> LayerStatus:
    """How much of a layer is local, what was fetched for it, and how that went.

    Args:
        layer: loaded.
        cache: of the process.
        shard: number of this one.
    """
    share = await trio.to_thread.run_sync(local_share, layer.index, cache)
    counters = layer.reader.fetcher.requests.counters
    ago = None if layer.last_read is None else time.monotonic() - layer.last_read
    return LayerStatus(
        slot=layer.record.slot,
        shard=shard,
        layer=layer.record.layer_digest,
        reference=layer.record.reference,
        blob_bytes=layer.record.blob_size,
        files=share.all_files,
        local_files=share.files,
        bytes=layer.index.total_size,
        local_bytes=share.bytes,
        requests=counters.requests,
        fetched_bytes=counters.bytes_fetched,
        fetched_by_class={p.label: size for p, size in counters.bytes_by_class.items()},
        errors=counters.errors,
        last_error=counters.last_error,
        last_read_seconds_ago=ago,
    )


def trace(
    layers: Iterable[tuple[int, MountedLayer | None]],
    since: float,
    started: float,
    scheduler: Scheduler,
) -> list[Told]:
    """What was fetched for layers, and who waited.

    Args:
        layers: by slot; those that are not loaded had no events.
        since: leave out what began before; as all times here, by time.monotonic().
        started: when this process was.
        scheduler: of the process.
    """
    now = time.monotonic()
    found = []
    for slot, layer in layers:
        told = Told(slot=slot, started=started, now=now, forgotten=forgotten())
        if layer is not None:
            fetcher = layer.reader.fetcher
            fetched, waited = fetcher.requests.trace.events(since)
            host = scheduler.host(fetcher.host)
            told = msgspec.structs.replace(
                told,
                fetched=fetched,
                waited=waited,
                round_trip=host.round_trip,
                bandwidth=host.bandwidth,
                recording=layer.recorder is not None,
            )
        found.append(told)
    return found


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
