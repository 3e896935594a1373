# SPDX-License-Identifier: Apache-2.0
"""`lazysnap status`: the images, how much of their layers is local, and why some are not lazy.

Needs no daemon. A shard that does not answer is shown as such; what is local of its layers is then
found by looking at the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import click
import trio

from lazysnap import config_file, log
from lazysnap.cli import interrupt
from lazysnap.cli.options import config_option, root_option
from lazysnap.cli.root_state import inquire
from lazysnap.errors import ConfigError
from lazysnap.quantities import bytes_text

_EXIT_SILENT_SHARD = 1
_CLEAR = "\033[H\033[2J\033[3J"


@click.command()
@config_option
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--watch", is_flag=True, help="Repeat until Ctrl-C; with --json, print a line each time."
)
@click.option(
    "--interval",
    default=2.0,
    type=click.FloatRange(min=0.1),
    show_default=True,
    help="Seconds between two outputs of --watch.",
)
@click.pass_context
def command(
    ctx: click.Context,
    config_path: str | None,
    root: str | None,
    as_json: bool,
    watch: bool,
    interval: float,
) -> None:
    """Show images and layers: what is local, what was fetched, why a layer is not lazy.

    Exit status: 1 if a shard does not answer.

    \b
    Examples:
      lazysnap status
      lazysnap status --json --watch
    """
    log.setup("error")
    directory = readable_root(root or config_file.load(config_path).root)

    async def look() -> dict[str, Any]:
        return await inquire(directory)

    async def go_on() -> None:
        while True:
            document = await look()
            text = json.dumps(document) if as_json else _CLEAR + _as_text(document)
            click.echo(text)
            await trio.sleep(interval)

    if watch:
        interrupt.run(go_on)
        return
    document = interrupt.run(look)
    click.echo(json.dumps(document, indent=2) if as_json else _as_text(document))
    if any(shard["error"] for shard in document["shards"]):
        ctx.exit(_EXIT_SILENT_SHARD)


def readable_root(path: str) -> str:
    """The root directory without links in its path.

    Raises:
        ConfigError: it is not there, or we may not look at it.
    """
    directory = os.path.realpath(path)
    try:
        os.listdir(directory)
    except OSError as error:
        raise ConfigError(
            f"the root {directory} cannot be read: {error.strerror}",
            hint="run as root, and name lazysnap's directory with --root",
        ) from error
    return directory


def _as_text(document: dict[str, Any]) -> str:
    return "\n".join(_lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    daemon = document["daemon"]
    if daemon["running"]:
        yield f"daemon: pid {daemon['pid']}, release {daemon['version']}, {daemon['address']}"
    else:
        yield "daemon: not running; mounted layers go on working"
    for shard in document["shards"]:
        state = shard["error"] or f"pid {shard['pid']}, up {shard['uptimeSeconds']:.0f} s"
        yield f"shard {shard['shard']}: {shard['layers']} layers, {state}"
    for image in document["images"]:
        yield ""
        users = f", used by {', '.join(map(_user, image['usedBy']))}" if image["usedBy"] else ""
        count = f"{image['lazyLayers']} of {len(image['layers'])} layers lazy"
        yield f"{image['reference']}: {count}{users}"
        for layer in image["layers"]:
            yield f"  {_layer_text(layer)}"
    yield ""
    totals, cache, network = document["totals"], document["cache"], document["network"]
    yield (
        f"{totals['layers']} lazy layers: {_share(totals)} local, {_fetched(totals)},"
        f" {totals['errors']} errors"
    )
    if document["otherSnapshots"]:
        yield f"{document['otherSnapshots']} other committed snapshots: no lazy mount was asked for"
    free = cache["fileSystemFreeBytes"]
    yield (
        f"cache: {bytes_text(cache['bytes'])} in {cache['contents']} contents,"
        f" {bytes_text(cache['layerFileBytes'])} in indexes and trees"
        + ("" if free is None else f", {bytes_text(free)} free")
    )
    yield (
        f"network: {bytes_text(network['receivedBytes'])} in {network['requests']} requests,"
        f" {network['retries']} retries, {network['hungReads']} reads hang"
    )
    for problem in document["problems"]:
        yield f"problem: {problem}"


def _user(key: str) -> str:
    """A key as containerd's clients know it: it reaches us as `namespace/number/key`."""
    parts = key.split("/", 2)
    return f"{parts[0]}/{parts[2]}" if len(parts) == 3 and parts[1].isdigit() else key


def _layer_text(layer: dict[str, Any]) -> str:
    name = (layer["layer"] or layer["snapshot"]).rpartition(":")[2][:12]
    if not layer["lazy"]:
        return f"{name:12}  unpacked: {layer['reason'] or 'no lazy mount was asked for'}"
    if layer["bytes"] is None:
        return f"{name:12}  slot {layer['slot']}: {layer['lastError'] or 'not known'}"
    parts = [f"{_share(layer)} local", f"{layer['localFiles']} of {layer['files']} files"]
    if layer["requests"] is None:
        parts.append(f"shard {layer['shard']} does not answer")
    else:
        parts += [_fetched(layer), f"shard {layer['shard']}"]
        if layer["lastReadSecondsAgo"] is not None:
            parts.append(f"read {layer['lastReadSecondsAgo']:.0f} s ago")
    if layer["errors"]:
        parts.append(f"{layer['errors']} errors: {layer['lastError']}")
    return f"{name:12}  {', '.join(parts)}"


def _fetched(numbers: dict[str, Any]) -> str:
    kinds = [f"{bytes_text(size)} {name}" for name, size in numbers["fetched"].items() if size]
    of = f" ({', '.join(kinds)})" if kinds else ""
    return f"{bytes_text(numbers['fetchedBytes'])}{of} fetched in {numbers['requests']} requests"


def _share(numbers: dict[str, Any]) -> str:
    percent = 100 * numbers["localBytes"] / numbers["bytes"] if numbers["bytes"] else 100.0
    return (
        f"{bytes_text(numbers['localBytes'])} of {bytes_text(numbers['bytes'])} ({percent:.0f} %)"
    )
