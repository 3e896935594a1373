# SPDX-License-Identifier: Apache-2.0
"""`lazysnap umount`: the end of what `lazysnap mount` began."""

from __future__ import annotations

import json
import os

import click

from lazysnap import log, mounts
from lazysnap.cli import interrupt
from lazysnap.standalone.mounting import unmount
from lazysnap.standalone.root import default_root


@click.command()
@click.argument("mountpoint", type=click.Path())
@click.option(
    "--root",
    type=click.Path(),
    help="The --root of `lazysnap mount`.  [default: as there]",
)
@click.option("--lazy", is_flag=True, help="Unmount it even while it is in use.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(mountpoint: str, root: str | None, lazy: bool, as_json: bool) -> None:
    """Unmount the image at MOUNTPOINT; with the last one, the processes that serve it end.

    It also cleans up after commands that were killed. What was fetched stays in the cache.

    \b
    Example:
      lazysnap umount /mnt
    """
    log.setup("error")
    path = _resolved(mountpoint)
    directory = os.path.realpath(root or default_root())

    async def work() -> bool:
        return await unmount(directory, path, lazy=lazy)

    was_mounted = interrupt.run(work)
    if as_json:
        click.echo(json.dumps({"mountpoint": path, "unmounted": was_mounted}))
    elif not was_mounted:
        click.echo(f"nothing was mounted at {path}", err=True)


def _resolved(path: str) -> str:
    """A path without links, found without asking what is mounted there, which may not answer."""
    parent, name = os.path.split(os.path.abspath(path))
    found = os.path.join(os.path.realpath(parent), name)
    return found if mounts.mounted_at(found) is not None else os.path.realpath(found)
