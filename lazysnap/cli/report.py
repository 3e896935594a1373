# SPDX-License-Identifier: Apache-2.0
"""`lazysnap report`: what happened while an image started, and what held it up, as a page.

Needs neither the daemon nor containerd. Tells what the workers remember, see `lazysnap.fetch.trace`.
"""

from __future__ import annotations

import json

import click
import msgspec
import trio

from lazysnap import config_file, log
from lazysnap.cli import interrupt
from lazysnap.cli.drain import chosen
from lazysnap.cli.options import config_option, root_option
from lazysnap.cli.root_state import database, inquire, slot_records
from lazysnap.cli.status import readable_root
from lazysnap.errors import InvalidArgument
from lazysnap.quantities import bytes_text
from lazysnap.report.gather import Question, gather
from lazysnap.report.model import Report
from lazysnap.report.page import page

_OUTPUT = "lazysnap-report.html"


@click.command()
@click.argument("image")
@config_option
@root_option
@click.option(
    "--output",
    "-o",
    type=click.Path(),
    help=f"Write the page here; - is standard output.  [default: {_OUTPUT}]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; a page only with --output.")
def command(
    image: str, config_path: str | None, root: str | None, output: str | None, as_json: bool
) -> None:
    """Show how IMAGE started on this node: what was fetched when, and which reads waited.

    The workers remember only the latest events, and forget all when they end: run this soon after the
    start.

    \b
    Example:
      lazysnap report registry.example/app:1 -o app.html
    """
    log.setup("error")
    if as_json and output == "-":
        raise InvalidArgument("--json and --output - cannot both use standard output")
    directory = readable_root(root or config_file.load(config_path).root)
    report = interrupt.run(lambda: _look(directory, image))
    path = output or ("" if as_json else _OUTPUT)
    if path:
        _write(path, page(report))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
    elif path != "-":
        click.echo(_as_text(report, path))


async def _look(root: str, name: str) -> Report:
    document = await inquire(root)
    (image, *_) = chosen(document, [name])
    # What is wrong with them `inquire` has noticed already.
    records = await trio.to_thread.run_sync(slot_records, root, [])
    snapshots, _ = await trio.to_thread.run_sync(database, root, [])
    by_name = {snapshot.name: snapshot for snapshot in snapshots}
    return await gather(Question(root, image, by_name, records, document["problems"]))


def _write(path: str, text: str) -> None:
    try:
        with click.open_file(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error.strerror}") from error


def _as_text(report: Report, path: str) -> str:
    received = sum(each.received for each in report.ranges)
    requests = sum(each.received > 0 for each in report.ranges)
    lines = [
        f"{report.image}: {bytes_text(received)} fetched in {requests} requests,"
        f" {len(report.waits)} reads waited for {report.savings.waited_seconds:.2f} s",
        *(f"  {slow.seconds:7.3f} s  {slow.file}" for slow in report.slowest[:5]),
        *(f"note: {sentence}" for sentence in report.missing),
        f"written to {path}",
    ]
    return "\n".join(lines)
