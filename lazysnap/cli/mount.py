# SPDX-License-Identifier: Apache-2.0
"""`lazysnap mount`: a whole image as a directory. What that takes is in `lazysnap.standalone`."""

from __future__ import annotations

import json
import os
import platform as machine

import click

from lazysnap import log
from lazysnap.cli import interrupt
from lazysnap.platforms import Platform
from lazysnap.quantities import bytes_text
from lazysnap.reference import ARCHIVE, LAYOUT, Reference
from lazysnap.standalone.image import LayerResult
from lazysnap.standalone.mounting import Mounted, Request, mount
from lazysnap.standalone.root import default_root


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("mountpoint", type=click.Path())
@click.option("--plain-http", is_flag=True, help="Speak HTTP without TLS to the registry.")
@click.option(
    "--writable", is_flag=True, help="Make it writable; `lazysnap umount` discards the changes."
)
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Platform of the image.  [default: this machine's]",
)
@click.option(
    "--root",
    type=click.Path(),
    help="Directory of all state and the cache, not the one of lazysnap serve."
    " [default: /var/lib/lazysnap-standalone, for ordinary users $XDG_DATA_HOME/lazysnap]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Log to standard error.")
def command(
    reference: str,
    mountpoint: str,
    plain_http: bool,
    writable: bool,
    platform: str | None,
    root: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Mount the image REF at the empty directory MOUNTPOINT; files are fetched when they are read.

    REF is a name in a registry, oci:DIRECTORY[:NAME], or oci-archive:FILE[:NAME]. No daemon is needed.
    The mount is nosuid and nodev, and read-only without --writable. `lazysnap umount` removes it.

    \b
    Examples:
      lazysnap mount registry.example/app:1 /mnt
      lazysnap mount oci:./layout:app /mnt --writable
    """
    log.setup("debug" if debug else "warning")
    request = Request(
        _reference(reference),
        # nothing is mounted there yet, so looking at it cannot hang
        os.path.realpath(mountpoint),
        Platform.parse(platform or f"linux/{machine.machine()}"),
        writable,
        plain_http,
    )
    directory = os.path.realpath(root or default_root())

    def progress(number: int, layer: LayerResult) -> None:
        if not as_json:
            reason = f" ({layer.reason})" if layer.reason else ""
            click.echo(
                f"layer {number + 1}: {layer.digest[7:19]} {bytes_text(layer.size)}:"
                f" {layer.state}{reason}",
                err=True,
            )

    async def work() -> Mounted:
        return await mount(directory, request, progress)

    done = interrupt.run(work)
    if as_json:
        click.echo(json.dumps(_document(done, writable), indent=2))


def _reference(text: str) -> Reference:
    """A reference as people type it: the path of a local image may be relative."""
    for kind in (LAYOUT, ARCHIVE):
        if text.startswith(kind):
            path, colon, name = text.removeprefix(kind).partition(":")
            return Reference.parse(f"{kind}{os.path.abspath(path)}{colon}{name}")
    return Reference.parse(text)


def _document(done: Mounted, writable: bool) -> dict[str, object]:
    return {
        "reference": done.record.reference,
        "manifest": done.record.manifest,
        "mountpoint": done.record.mountpoint,
        "writable": writable,
        "lazyLayers": sum(layer.state == "lazy" for layer in done.layers),
        "totalLayers": len(done.layers),
        "layers": [
            {
                "digest": layer.digest,
                "size": layer.size,
                "state": layer.state,
                "reason": layer.reason,
            }
            for layer in done.layers
        ],
    }
