# SPDX-License-Identifier: Apache-2.0
"""Everything that can be said of a root: its images, layers and shards, as one document.

Reads the database, the slots and the cache, and asks the shards; needs no daemon. What cannot be had is
left out, and why is in `problems`. Changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from lazysnap import channel
from lazysnap.cache import Cache
from lazysnap.cache.inventory import entries
from lazysnap.check.finding import Context
from lazysnap.check.state import running_daemon
from lazysnap.cli.images import Image, Layer, images
from lazysnap.errors import LazysnapError
from lazysnap.fetch.coverage import local_share
from lazysnap.layers.slots import SlotRecord, list_slots, read_slot
from lazysnap.layers.view import open_index
from lazysnap.metrics import families
from lazysnap.metrics.counts import Sample
from lazysnap.metrics.totals import added
from lazysnap.paths import Root
from lazysnap.store.reader import SnapshotReader
from lazysnap.store.records import Attachment, Snapshot

# Long: a worker that is busy is not a dead one.
_PING_SECONDS = 5.0
# A worker looks at every file of each layer.
_STATUS_SECONDS = 30.0
CLASSES = ("demand", "prefetch", "background")
SUMMED = ("bytes", "localBytes", "fetchedBytes", "requests", "errors")


@dataclass
class _Shards:
    """What the shards answered."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
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
    counted = [_numbers(answered.layers.get(slot, {})) for slot in unique.values()]
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
    shard: dict[str, Any] = {"shard": number, "error": "", "layers": len(slots)}
    answered.shards.append(shard)
    try:
        who = await channel.call(path, "ping", timeout=_PING_SECONDS)
        shard |= {
            "pid": who["pid"],
            "version": who["version"],
            "uptimeSeconds": round(who["uptime_seconds"], 1),
        }
        told = await channel.call(path, "metrics", timeout=_PING_SECONDS)
        answered.sample = added(answered.sample, told["sample"])
        answered.hung += told["gauges"][families.READS_HUNG]
    except LazysnapError as error:
        shard["error"] = str(error)
        return
    # One by one, as one that cannot be loaded fails the whole call.
    for slot in slots:
        try:
            (answer,) = await channel.call(path, "status", timeout=_STATUS_SECONDS, slots=[slot])
        except LazysnapError as error:
            answer = {"last_error": str(error)}
        answered.layers[slot] = answer


def _on_disk(root: str, record: SlotRecord) -> dict[str, Any]:
    """How much of a layer is local, without its shard."""
    cache = _open_cache(root)
    if cache is None:
        return {}
    try:
        index = open_index(cache.paths.index(record.index))
    except LazysnapError as error:
        return {"last_error": str(error)}
    share = local_share(index, cache)
    return {
        "files": share.all_files,
        "local_files": share.files,
        "bytes": index.total_size,
        "local_bytes": share.bytes,
    }


def _open_cache(root: str) -> Cache | None:
    """The cache; None if there is none, as a look must not make one."""
    directory = Root(root).cache
    return Cache(directory.path) if os.path.isdir(directory.objects) else None


def _cache(root: str, problems: list[str]) -> dict[str, Any]:
    numbers = {"contents": 0, "bytes": 0, "fileSystemFreeBytes": None}
    cache = _open_cache(root)
    if cache is None:
        return numbers
    try:
        for entry in entries(cache):
            numbers["contents"] += 1  # type: ignore[operator]
            numbers["bytes"] += entry.disk_bytes  # type: ignore[operator]
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
    image: Image, records: Mapping[int, SlotRecord], answers: Mapping[int, dict[str, Any]]
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
    layer: Layer, records: Mapping[int, SlotRecord], answers: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    record = records.get(layer.slot)
    answer = answers.get(layer.slot, {})
    return {
        "layer": layer.digest,
        "snapshot": layer.snapshot,
        "lazy": bool(layer.slot),
        "reason": layer.reason,
        "usedBy": list(layer.used_by),
        "slot": layer.slot or None,
        "shard": None if record is None else record.shard,
        "blobBytes": None if record is None else record.blob_size,
        **_numbers(answer),
        "lastError": answer.get("last_error") or "",
        "lastReadSecondsAgo": answer.get("last_read_seconds_ago"),
    }


def _numbers(answer: Mapping[str, Any]) -> dict[str, Any]:
    get: Callable[[str], Any] = answer.get
    by_class = get("fetched_by_class") or {}
    return {
        "files": get("files"),
        "localFiles": get("local_files"),
        "bytes": get("bytes"),
        "localBytes": get("local_bytes"),
        "fetchedBytes": get("fetched_bytes"),
        "fetched": {name: by_class.get(name, 0) for name in CLASSES},
        "requests": get("requests"),
        "errors": get("errors"),
    }
