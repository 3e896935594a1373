# SPDX-License-Identifier: Apache-2.0
"""`lazysnap status`: the layers that are mounted lazily, how much of them is local, and the shards.

Asks the workers at their sockets and reads `slots/`, so it needs no daemon. A shard that does not
answer is shown as such, with its layers.
"""

from __future__ import annotations

import json
import os
from typing import Any

import click
import trio

from lazysnap import channel, config, log
from lazysnap.cli.units import bytes_text
from lazysnap.errors import ConfigError, LazysnapError
from lazysnap.layers.slots import SlotRecord, list_slots, read_slot

_PING_SECONDS = 2.0
# A worker looks at every file of each layer.
_STATUS_SECONDS = 30.0
_EXIT_SILENT_SHARD = 1


@click.command()
@click.option("--config", "config_path", type=click.Path(), help="Configuration file (TOML).")
@click.option("--root", type=click.Path(), help="Directory of all of lazysnap's state.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, config_path: str | None, root: str | None, as_json: bool) -> None:
    """Show the lazily mounted layers and how much of them is local.

    Exit status: 1 if a shard does not answer.
    """
    log.setup("error")
    directory = os.path.abspath(root or config.load(config_path).root)
    try:
        os.listdir(directory)
    except OSError as error:
        raise ConfigError(
            f"the root {directory} cannot be read: {error.strerror}",
            hint="run as root, and name lazysnap's directory with --root",
        ) from error
    document = trio.run(_collect, directory)
    click.echo(json.dumps(document, indent=2) if as_json else _as_text(document))
    if any(shard["error"] for shard in document["shards"]):
        ctx.exit(_EXIT_SILENT_SHARD)


async def _collect(root: str) -> dict[str, Any]:
    records: list[SlotRecord] = []
    unreadable: list[str] = []
    for slot in list_slots(root):
        try:
            records.append(read_slot(root, slot))
        except LazysnapError as error:
            unreadable.append(str(error))
    shards: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []

    async def ask(number: int, mine: list[SlotRecord]) -> None:
        shard, found = await _ask(root, number, [record.slot for record in mine])
        shards.append(shard)
        answers = {row["slot"]: row for row in found}
        layers.extend(_layer(record, answers.get(record.slot)) for record in mine)

    async with trio.open_nursery() as nursery:
        for number in sorted({record.shard for record in records} | set(_sockets(root))):
            nursery.start_soon(ask, number, [r for r in records if r.shard == number])
    return {
        "root": root,
        "shards": sorted(shards, key=lambda shard: shard["shard"]),
        "layers": sorted(layers, key=lambda layer: (layer["reference"], layer["slot"])),
        "unreadable": unreadable,
        "totals": {key: sum(layer[key] or 0 for layer in layers) for key in _SUMMED},
    }


_SUMMED = ("bytes", "localBytes", "fetchedBytes", "requests", "errors")


def _sockets(root: str) -> list[int]:
    try:
        names = os.listdir(os.path.join(root, "shards"))
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".sock") and name[:-5].isdigit()]


async def _ask(
    root: str, number: int, slots: list[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a shard says of itself and of its layers; as much of it as can be had."""
    path = os.path.join(root, "shards", f"{number}.sock")
    shard: dict[str, Any] = {"shard": number, "error": "", "layers": len(slots)}
    found: list[dict[str, Any]] = []
    try:
        who = await channel.call(path, "ping", timeout=_PING_SECONDS)
        shard |= {
            "pid": who["pid"],
            "version": who["version"],
            "uptimeSeconds": round(who["uptime_seconds"], 1),
        }
    except LazysnapError as error:
        shard["error"] = str(error)
        return shard, found
    # One by one, as one that cannot be loaded fails the whole call.
    for slot in slots:
        try:
            found += await channel.call(path, "status", timeout=_STATUS_SECONDS, slots=[slot])
        except LazysnapError as error:
            found.append({"slot": slot, "last_error": str(error)})
    return shard, found


def _layer(record: SlotRecord, answer: dict[str, Any] | None) -> dict[str, Any]:
    known = answer or {}
    return {
        "reference": record.reference,
        "layer": record.layer_digest,
        "slot": record.slot,
        "shard": record.shard,
        "blobBytes": record.blob_size,
        "files": known.get("files"),
        "localFiles": known.get("local_files"),
        "bytes": known.get("bytes"),
        "localBytes": known.get("local_bytes"),
        "fetchedBytes": known.get("fetched_bytes"),
        "requests": known.get("requests"),
        "errors": known.get("errors"),
        "lastError": known.get("last_error"),
    }


def _as_text(document: dict[str, Any]) -> str:
    lines = []
    for shard in document["shards"]:
        state = shard["error"] or f"pid {shard['pid']}, up {shard['uptimeSeconds']:.0f} s"
        lines.append(f"shard {shard['shard']}: {shard['layers']} layers, {state}")
    reference = None
    for layer in document["layers"]:
        if layer["reference"] != reference:
            reference = layer["reference"]
            lines.append(reference)
        lines.append("  " + _layer_text(layer))
    lines += document["unreadable"]
    totals = document["totals"]
    lines.append(
        f"{len(document['layers'])} layers: {_share(totals)} local,"
        f" {bytes_text(totals['fetchedBytes'])} fetched in {totals['requests']} requests,"
        f" {totals['errors']} errors"
    )
    return "\n".join(lines)


def _layer_text(layer: dict[str, Any]) -> str:
    name = layer["layer"].partition(":")[2][:12]
    if layer["bytes"] is None:
        return f"{name}  slot {layer['slot']}: {layer['lastError'] or 'not known'}"
    text = (
        f"{name}  {_share(layer)} local, {layer['localFiles']} of {layer['files']} files,"
        f" {bytes_text(layer['fetchedBytes'])} fetched"
    )
    return text + (f", {layer['errors']} errors: {layer['lastError']}" if layer["errors"] else "")


def _share(numbers: dict[str, Any]) -> str:
    percent = 100 * numbers["localBytes"] / numbers["bytes"] if numbers["bytes"] else 100.0
    return (
        f"{bytes_text(numbers['localBytes'])} of {bytes_text(numbers['bytes'])} ({percent:.0f} %)"
    )
