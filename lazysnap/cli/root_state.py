# SPDX-License-Identifier: Apache-2.0
"""Everything that can be said of a root: its images, layers and shards, as one document.

Reads the database, the slots and the cache, and asks the shards; needs no daemon. What cannot be had is
left out, and why is in `problems`. Changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from lazysnap.cache import Cache
from lazysnap.cache.inventory import entries, layer_files
from lazysnap.check.finding import Context
from lazysnap.check.state import running_daemon
from lazysnap.cli.images import Image, Layer, images
from lazysnap.errors import LazysnapError
from lazysnap.fetch.coverage import LocalShare, local_share
from lazysnap.layers.slots import SlotRecord, list_slots, read_slot
from lazysnap.layers.view import open_index
from lazysnap.metrics import families
from lazysnap.metrics.counts import Sample
from lazysnap.metrics.totals import added
from lazysnap.paths import Root
from lazysnap.shard.calls import LayerStatus
from lazysnap.shard.client import connect
from lazysnap.store.reader import SnapshotReader
from lazysnap.store.records import Attachment, Snapshot

# Long: a worker that is busy is not a dead one.
_PING_SECONDS = 5.0
# A worker looks at every file of each layer.
_STATUS_SECONDS = 30.0
CLASSES = ("demand", "prefetch", "background")
SUMMED = ("bytes", "localBytes", "fetchedBytes", "requests", "errors")


@dataclass(frozen=True)
class _Known:
    """What is known of a layer: all of it, or only what the disk tells, or only why nothing is.

    Attributes:
        status: what its worker answers, if it does.
        share: how much is local, if that is known.
        bytes: size of the content of all files, if that is known.
        error: why nothing is known.
    """

    status: LayerStatus | None = None
    share: LocalShare | None = None
    bytes: int | None = None
    error: str = ""


@dataclass
class _Shards:
    """What the shards answered."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[int, _Known] = field(default_factory=dict)
    sample: Sample = field(default_factory=dict)
    hung: int = 0


async def inquire(root: str) -> dict[str, Any]:
    """The document that `lazysnap status --json` prints.

    Args:
        root: lazysnap's root directory, without links in its path.
    """
    problems: list[str] = []
    snapshots, attached = await trio.to_thread.run_sync(database, root, problems)
    records = await trio.to_thread.run_sync(slot_records, root, problems)
    answered = await _ask_all(root, records)
    silent = [record for record in records.values() if record.slot not in answered.layers]
    for record in silent:
        look = await trio.to_thread.run_sync(_on_disk, root, record)
        answered.layers[record.slot] = look
    slots = {number: attachment.slot for number, attachment in attached.items()}
    found, others = images(snapshots, records, slots)
    described = [_image(image, records, answered.layers) for image in found]
    unique = {record.index: record.slot for record in records.values()}
    counted = [_numbers(answered.layers.get(slot, _Known())) for slot in unique.values()]
    return {
        "root": root,
        "daemon": _daemon(root),
        "shards": sorted(answered.shards, key=lambda shard: shard["shard"]),
        "images": described,
        "otherSnapshots": others,
        "totals": {
            "layers": len(records),
            **{key: sum(each[key] or 0 for each in counted) for key in SUMMED},
            "fetched": {name: sum(each["fetched"][name] for each in counted) for name in CLASSES},
        },
        "cache": await trio.to_thread.run_sync(_cache, root, problems),
        "network": _network(answered),
        "problems": problems,
    }


def slot_records(root: str, problems: list[str]) -> dict[int, SlotRecord]:
    """What the slots of a root serve, by number; those that cannot be read are problems."""
    records = {}
    for slot in list_slots(root):
        try:
            records[slot] = read_slot(root, slot)
        except LazysnapError as error:
            problems.append(str(error))
    return records


def database(root: str, problems: list[str]) -> tuple[list[Snapshot], dict[int, Attachment]]:
    """All snapshots, and what is served for those that are lazy."""
    path = Root(root).database
    try:
        reader = SnapshotReader.open_read_only(path)
        if reader is None:
            return [], {}
        with contextlib.closing(reader):
            return list(reader.walk()), reader.attachments()
    except (sqlite3.Error, LazysnapError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return [], {}


def _daemon(root: str) -> dict[str, Any]:
    found = running_daemon(Context(root=root, address="", containerd=""))
    if found is None:
        return {"running": False}
    return {
        "running": True,
        "pid": found.pid,
        "version": found.version,
        "address": found.address,
    }


async def _ask_all(root: str, records: Mapping[int, SlotRecord]) -> _Shards:
    answered = _Shards()
    async with trio.open_nursery() as nursery:
        for number in sorted({r.shard for r in records.values()} | set(Root(root).shard_numbers())):
            mine = [record.slot for record in records.values() if record.shard == number]
            nursery.start_soon(_ask, root, number, mine, answered)
    return answered


async def _ask(root: str, number: int, slots: Sequence[int], answered: _Shards) -> None:
    """What a shard says of itself and of its layers; as much of it as can be had."""
    path = Root(root).shard_socket(number)
    worker = connect(path, timeout=_PING_SECONDS)
    shard: dict[str, Any] = {"shard": number, "error": "", "layers": len(slots)}
    answered.shards.append(shard)
    try:
        who = await worker.ping()
        shard |= {
            "pid": who.pid,
            "version": who.version,
            "uptimeSeconds": round(who.uptime_seconds, 1),
        }
        told = await worker.metrics()
        answered.sample = added(answered.sample, told.sample)
        answered.hung += int(told.gauges.get(families.READS_HUNG, 0))
    except LazysnapError as error:
        shard["error"] = str(error)
        return
    # One by one, as one that cannot be loaded fails the whole call.
    worker = connect(path, timeout=_STATUS_SECONDS)
    for slot in slots:
        try:
            (status,) = await worker.status([slot])
        except LazysnapError as error:
            answered.layers[slot] = _Known(error=str(error))
            continue
        share = LocalShare(status.local_files, status.files, status.local_bytes)
        answered.layers[slot] = _Known(status, share, status.bytes)


def _on_disk(root: str, record: SlotRecord) -> _Known:
    """How much of a layer is local, without its shard."""
    cache = _open_cache(root)
    if cache is None:
        return _Known()
    try:
        index = open_index(cache.paths.index(record.index))
    except LazysnapError as error:
        return _Known(error=str(error))
    return _Known(share=local_share(index, cache), bytes=index.total_size)


def _open_cache(root: str) -> Cache | None:
    """The cache; None if there is none, as a look must not make one."""
    directory = Root(root).cache
    return Cache(directory.path) if os.path.isdir(directory.objects) else None


def _cache(root: str, problems: list[str]) -> dict[str, Any]:
    numbers = {"contents": 0, "bytes": 0, "layerFileBytes": 0, "fileSystemFreeBytes": None}
    cache = _open_cache(root)
    if cache is None:
        return numbers
    try:
        for entry in entries(cache):
            numbers["contents"] += 1  # type: ignore[operator]
            numbers["bytes"] += entry.disk_bytes  # type: ignore[operator]
        numbers["layerFileBytes"] = sum(entry.disk_bytes for entry in layer_files(cache.paths))
        status = os.statvfs(cache.root)
        numbers["fileSystemFreeBytes"] = status.f_bavail * status.f_frsize
    except OSError as error:
        problems.append(f"{cache.root} cannot be read: {error.strerror}")
    return numbers


def _network(answered: _Shards) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(answered.sample.get(name, {}).get("", [0])[0])

    return {
        "receivedBytes": number(families.REGISTRY_BYTES),
        "requests": number(families.REGISTRY_REQUESTS),
        "retries": number(families.REGISTRY_RETRIES),
        "hungReads": answered.hung,
    }


def _image(
    image: Image, records: Mapping[int, SlotRecord], answers: Mapping[int, _Known]
) -> dict[str, Any]:
    layers = [_layer(layer, records, answers) for layer in image.layers]
    return {
        "reference": image.reference,
        "lazyLayers": sum(layer["lazy"] for layer in layers),
        "usedBy": _each(layer.used_by for layer in image.layers),
        "layers": layers,
    }


def _each(names: Iterable[Sequence[str]]) -> list[str]:
    return sorted({name for several in names for name in several})


def _layer(
    layer: Layer, records: Mapping[int, SlotRecord], answers: Mapping[int, _Known]
) -> dict[str, Any]:
    record = records.get(layer.slot)
    known = answers.get(layer.slot, _Known())
    status = known.status
    return {
        "layer": layer.digest,
        "snapshot": layer.snapshot,
        "lazy": bool(layer.slot),
        "reason": layer.reason,
        "usedBy": list(layer.used_by),
        "slot": layer.slot or None,
        "shard": None if record is None else record.shard,
        "blobBytes": None if record is None else record.blob_size,
        **_numbers(known),
        "lastError": known.error if status is None else status.last_error,
        "lastReadSecondsAgo": None if status is None else status.last_read_seconds_ago,
    }


def _numbers(known: _Known) -> dict[str, Any]:
    share, status = known.share, known.status
    by_class = {} if status is None else status.fetched_by_class
    return {
        "files": None if share is None else share.all_files,
        "localFiles": None if share is None else share.files,
        "bytes": known.bytes,
        "localBytes": None if share is None else share.bytes,
        "fetchedBytes": None if status is None else status.fetched_bytes,
        "fetched": {name: by_class.get(name, 0) for name in CLASSES},
        "requests": None if status is None else status.requests,
        "errors": None if status is None else status.errors,
    }
