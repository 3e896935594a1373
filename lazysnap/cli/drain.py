# SPDX-License-Identifier: Apache-2.0
"""`lazysnap drain`: fetch all of lazy images, so that nothing of them needs the network any more.

The workers fetch; this asks them to, again and again until all is there, as a worker that is replaced
forgets that it was asked. Needs no daemon.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
import trio

from lazysnap import config_file, log
from lazysnap.cli import interrupt
from lazysnap.cli.options import config_option, root_option
from lazysnap.cli.root_state import inquire
from lazysnap.cli.status import readable_root
from lazysnap.cli.units import duration
from lazysnap.errors import LazysnapError, NotFound
from lazysnap.paths import Root
from lazysnap.quantities import bytes_text
from lazysnap.reference import Reference
from lazysnap.shard.client import connect

_CALL_SECONDS = 30.0
_POLL_SECONDS = 0.5
_EXIT_INCOMPLETE = 1


@click.command()
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@config_option
@root_option
@click.option(
    "--patience",
    default="60s",
    callback=duration,
    metavar="DURATION",
    show_default=True,
    help="Give up when nothing has arrived for this time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    images: tuple[str, ...],
    config_path: str | None,
    root: str | None,
    patience: float,
    as_json: bool,
) -> None:
    """Fetch the rest of IMAGEs, or of all lazy images, into the cache.

    They need no network afterwards, unless the cache evicts some of it.

    Exit status: 1 if some of it could not be fetched.

    \b
    Example:
      lazysnap drain registry.example/app:1
    """
    log.setup("error")
    directory = readable_root(root or config_file.load(config_path).root)

    async def work() -> list[dict[str, Any]]:
        meant = chosen(await inquire(directory), images)
        layers = {each["slot"]: each for image in meant for each in image["layers"] if each["lazy"]}
        with _progress() as show:
            return await _Drain(directory, list(layers.values())).run(patience, show)

    layers = interrupt.run(work)
    complete = all(layer["complete"] for layer in layers)
    if as_json:
        click.echo(json.dumps({"complete": complete, "layers": layers}, indent=2))
    else:
        click.echo(_as_text(layers))
    if not complete:
        ctx.exit(_EXIT_INCOMPLETE)


def chosen(document: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The images that are meant.

    Raises:
        NotFound: there is none of a name.
    """
    images: list[dict[str, Any]] = document["images"]
    if not names:
        return images
    found = []
    for name in names:
        wanted = _full(name)
        matching = [image for image in images if _full(image["reference"]) == wanted]
        if not matching:
            raise NotFound(
                f"no image {name} has been pulled lazily", hint="`lazysnap status` names all"
            )
        found += matching
    return found


def _full(name: str) -> str:
    try:
        return str(Reference.parse(name))
    except LazysnapError:
        return name


class _Drain:
    """One run.

    Args:
        root: lazysnap's root directory.
        layers: lazy ones, as `inquire` describes them.
    """

    def __init__(self, root: str, layers: Sequence[Mapping[str, Any]]) -> None:
        self._root = root
        self._layers = {
            layer["slot"]: {
                "layer": layer["layer"],
                "slot": layer["slot"],
                "shard": layer["shard"],
                "bytes": layer["bytes"] or 0,
                "localBytes": layer["localBytes"] or 0,
                "complete": False,
                "lastError": "",
            }
            for layer in layers
        }

    async def run(self, patience: float, show: _Show) -> list[dict[str, Any]]:
        """Drain; the layers with how far they have come.

        Args:
            patience: seconds without progress after which it is given up.
            show: told all layers from time to time.
        """
        everything = list(self._layers.values())
        most, since = -1, trio.current_time()
        while True:
            async with trio.open_nursery() as nursery:
                for shard in {layer["shard"] for layer in everything if not layer["complete"]}:
                    nursery.start_soon(self._ask, shard)
            show(everything)
            local = sum(layer["localBytes"] for layer in everything)
            if local > most:
                most, since = local, trio.current_time()
            if all(layer["complete"] for layer in everything):
                return everything
            if trio.current_time() - since >= patience:
                return everything
            await trio.sleep(_POLL_SECONDS)

    async def _ask(self, shard: int) -> None:
        worker = connect(Root(self._root).shard_socket(shard), timeout=_CALL_SECONDS)
        for layer in self._layers.values():
            if layer["shard"] != shard or layer["complete"]:
                continue
            slots = [layer["slot"]]
            try:
                await worker.drain(slots)
                (state,) = await worker.status(slots)
            except LazysnapError as error:
                layer["lastError"] = str(error)
                continue
            layer["bytes"], layer["localBytes"] = state.bytes, state.local_bytes
            layer["complete"] = state.local_files == state.files
            layer["lastError"] = "" if layer["complete"] else state.last_error


class _Show:
    """Says how far it is: on a terminal on one line, elsewhere when much has changed."""

    _STEP = 10

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = -1

    def __call__(self, layers: Sequence[Mapping[str, Any]]) -> None:
        whole, local = (sum(layer[key] for layer in layers) for key in ("bytes", "localBytes"))
        percent = 100 * local // whole if whole else 100
        done = sum(layer["complete"] for layer in layers)
        text = (
            f"{done} of {len(layers)} layers, {bytes_text(local)} of {bytes_text(whole)}"
            f" ({percent} %)"
        )
        if self._terminal:
            click.echo(f"\r\033[K{text}", err=True, nl=False)
        elif percent >= self._said + self._STEP:
            self._said = percent
            click.echo(text, err=True)

    def end(self) -> None:
        """Nothing more comes."""
        if self._terminal:
            click.echo(err=True)


@contextmanager
def _progress() -> Iterator[_Show]:
    show = _Show()
    try:
        yield show
    finally:
        show.end()


def _as_text(layers: Sequence[Mapping[str, Any]]) -> str:
    missing = [layer for layer in layers if not layer["complete"]]
    lines = [
        f"{layer['layer'][7:19]} {bytes_text(layer['localBytes'])} of"
        f" {bytes_text(layer['bytes'])}: {layer['lastError'] or 'nothing arrives any more'}"
        for layer in missing
    ]
    lines.append(
        f"{len(layers) - len(missing)} of {len(layers)} lazy layers are completely local"
        + ("; is the cache's limit large enough for all of them?" if missing else "")
    )
    return "\n".join(lines)
