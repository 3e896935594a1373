# SPDX-License-Identifier: Apache-2.0
"""`lazysnap cache`: what is in the cache, whether it is right, and removing from it.

Works on the directory, so the daemon may run or not. Nothing here breaks a reader: who has a file open
goes on reading it, and what is gone is fetched again. Results go to standard output, progress to
standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import click

from lazysnap import config_file, log
from lazysnap.cache import Cache
from lazysnap.cache.eviction import CacheLimits, exclusive
from lazysnap.cache.inventory import Entry, Kind, entries, layer_files, remove
from lazysnap.cache.pruning import choose, leftovers, remove_leftover
from lazysnap.cache.verification import Verification, verify
from lazysnap.cache_settings import cache_limits
from lazysnap.cli import units
from lazysnap.cli.groups import Group
from lazysnap.cli.options import CONFIG_HELP, ROOT_HELP, config_option, root_option
from lazysnap.errors import ConfigError, Unavailable
from lazysnap.layers.in_use import names_in_use
from lazysnap.paths import Root
from lazysnap.quantities import bytes_text

_EXIT_REPAIRED = 1
_EXIT_WRONG = 2
_LOCK_SECONDS = 30.0
_BIGGEST = 10
_AGES = (("hour", 3600), ("day", 86400), ("week", 604800), ("month", 2592000))


@click.group(cls=Group)
@config_option
@root_option
@click.pass_context
def command(ctx: click.Context, config_path: str | None, root: str | None) -> None:
    """Show, verify and prune the cache on disk.

    The daemon may run meanwhile. What is removed is fetched again when it is read.

    \b
    Examples:
      lazysnap cache ls
      lazysnap cache prune --to-size 10GiB
    """
    log.setup("error")
    _set(ctx, config_path, root)


def _set(ctx: click.Context, config_path: str | None, root: str | None) -> None:
    given = ctx.ensure_object(dict)
    given.update({k: v for k, v in (("config", config_path), ("root", root)) if v})


def _located(function: Callable[..., None]) -> Callable[..., None]:
    """`--root` and `--config` behind the command's name too."""

    def take(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        _set(ctx, *((value, None) if param.name == "config" else (None, value)))

    for name, text in (("root", ROOT_HELP), ("config", CONFIG_HELP)):
        option = click.option(
            f"--{name}", type=click.Path(), expose_value=False, callback=take, help=text
        )
        function = option(function)
    return function


@contextlib.contextmanager
def _opened(ctx: click.Context) -> Iterator[tuple[Cache, CacheLimits, str]]:
    """The cache, its limits and lazysnap's root; translates what the disk refuses."""
    settings = config_file.load(ctx.obj.get("config"))
    root = os.path.abspath(ctx.obj.get("root") or settings.root)
    path = Root(root).cache.path
    try:
        os.listdir(path)  # else it would be made
        cache = Cache(path)
        yield cache, cache_limits(settings), root
    except OSError as error:
        raise ConfigError(
            f"the cache {path} cannot be used: {error.strerror}",
            hint="run as root, and name lazysnap's directory with --root",
        ) from error
    cache.objects.close()


# -- ls ---------------------------------------------------------------------------------------------


@command.command()
@_located
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def ls(ctx: click.Context, as_json: bool) -> None:
    """Show what the cache holds, and how much space it may take.

    \b
    Example:
      lazysnap cache ls --json
    """
    with _opened(ctx) as (cache, limits, _):
        found = sorted(entries(cache), key=lambda entry: entry.disk_bytes, reverse=True)
        status = os.statvfs(cache.root)
        layers = layer_files(cache.paths)
        contents = sum(entry.disk_bytes for entry in found)
        document: dict[str, Any] = {
            "path": cache.root,
            "diskBytes": contents,
            "allDiskBytes": contents + sum(entry.disk_bytes for entry in layers),
            "objects": _summary([e for e in found if e.kind is Kind.OBJECT]),
            "partials": _summary([e for e in found if e.kind is Kind.PARTIAL]),
            "indexes": _summary([e for e in layers if e.kind is Kind.INDEX]),
            "trees": _summary([e for e in layers if e.kind is Kind.TREE]),
            "lastUsed": _ages(found),
            "biggest": [_described(entry) for entry in found[:_BIGGEST]],
            "sizeLimitBytes": limits.size_limit_bytes,
            "reserveBytes": limits.reserve(status),
            "freeBytes": status.f_bavail * status.f_frsize,
        }
    click.echo(json.dumps(document, indent=2) if as_json else _ls_text(document))


def _summary(found: Sequence[Entry]) -> dict[str, int]:
    return {
        "count": len(found),
        "bytes": sum(entry.size for entry in found),
        "diskBytes": sum(entry.disk_bytes for entry in found),
    }


def _ages(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """Counts by the time of last use, each content in the first age that fits."""
    now = time.time()
    rows: list[dict[str, Any]] = [
        {"within": name, "count": 0, "diskBytes": 0} for name in [*(n for n, _ in _AGES), "longer"]
    ]
    for entry in found:
        age = now - entry.used_ns / 1e9
        place = next((i for i, (_, limit) in enumerate(_AGES) if age < limit), len(_AGES))
        rows[place]["count"] += 1
        rows[place]["diskBytes"] += entry.disk_bytes
    return rows


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind.value,
        "key": entry.key.hex(),
        "bytes": entry.size,
        "diskBytes": entry.disk_bytes,
        "lastUsed": int(entry.used_ns // 1_000_000_000),
    }


def _ls_text(document: dict[str, Any]) -> str:
    lines = [f"{document['path']}: {bytes_text(document['allDiskBytes'])} on disk"]
    for name in ("objects", "partials", "indexes", "trees"):
        part = document[name]
        lines.append(
            f"  {name:9} {part['count']:8}  {bytes_text(part['diskBytes']):>10} of"
            f" {bytes_text(part['bytes'])}"
        )
    lines.append("last used within")
    lines += [
        f"  {row['within']:9} {row['count']:8}  {bytes_text(row['diskBytes']):>10}"
        for row in document["lastUsed"]
    ]
    if document["biggest"]:
        lines.append("biggest")
    lines += [
        f"  {row['kind']:9} {bytes_text(row['diskBytes']):>10}  {row['key'][:16]}"
        for row in document["biggest"]
    ]
    limit = document["sizeLimitBytes"]
    lines.append(f"size limit {bytes_text(limit) if limit else 'none'}")
    lines.append(
        f"reserve    {bytes_text(document['reserveBytes'])}, free"
        f" {bytes_text(document['freeBytes'])}"
    )
    return "\n".join(lines)


# -- verify -----------------------------------------------------------------------------------------


@command.command("verify")
@_located
@click.option("--fix", is_flag=True, help="Remove what is wrong; it is fetched again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify_command(ctx: click.Context, fix: bool, as_json: bool) -> None:
    """Read the whole cache and compare it with its digests.

    Exit status: 0 all of it is right, 1 wrong contents were removed, 2 some contents are wrong.

    \b
    Example:
      lazysnap cache verify --fix
    """
    with _opened(ctx) as (cache, _, _), _progress(cache) as progress:
        result = verify(cache, fix=fix, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
    else:
        click.echo(_verify_text(result, fix))
    if result.wrong:
        ctx.exit(_EXIT_REPAIRED if fix else _EXIT_WRONG)


@contextlib.contextmanager
def _progress(cache: Cache) -> Iterator[Callable[[int], None]]:
    total = sum(entry.disk_bytes for entry in entries(cache))
    if not sys.stderr.isatty():
        click.echo(f"checking {bytes_text(total)}", err=True)
        yield lambda _: None
        return
    from rich.console import Console  # takes a tenth of a second to load
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=max(total, 1))
        yield lambda size: shown.advance(task, size)


def _verify_text(result: Verification, fix: bool) -> str:
    lines = [
        f"{wrong.what} {wrong.name}: {wrong.problem}{' (removed)' if wrong.removed else ''}"
        for wrong in result.wrong
    ]
    lines.append(
        f"{result.objects} objects, {result.partials} partial files ({result.chunks} chunks),"
        f" {result.indexes} indexes: {bytes_text(result.bytes)} checked,"
        f" {len(result.wrong)} wrong"
    )
    if result.unchecked:
        lines.append(
            f"{result.unchecked} partial files cannot be checked, as no index names them;"
            " readers check them"
        )
    if result.wrong and not fix:
        lines.append("remove what is wrong with `lazysnap cache verify --fix`")
    return "\n".join(lines)


# -- prune ------------------------------------------------------------------------------------------


@command.command(short_help="Remove leftovers, and contents that the options choose.")
@_located
@click.option("--all", "everything", is_flag=True, help="Remove all contents.")
@click.option(
    "--older-than", callback=units.duration, metavar="DURATION",
    help="Remove contents that were not used for this time, e.g. 36h.",
)  # fmt: skip
@click.option(
    "--to-size", callback=units.size, metavar="SIZE",
    help="Remove the least recently used until the rest takes this size, e.g. 10GiB.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def prune(
    ctx: click.Context,
    everything: bool,
    older_than: float | None,
    to_size: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove leftovers of crashes, indexes of layers that are gone, and contents that are chosen.

    Without options, no contents are removed.

    \b
    Example:
      lazysnap cache prune --older-than 14d --dry-run
    """
    with _opened(ctx) as (cache, _, root), exclusive(cache, _LOCK_SECONDS) as alone:
        if not alone:
            raise Unavailable(
                "another process is removing contents from the cache", hint="try again in a minute"
            )
        chosen = choose(cache, everything=everything, older_than=older_than, to_size=to_size)
        useless = leftovers(cache, _used_indexes(cache, root))
        if not dry_run:
            for entry in chosen:
                remove(cache, entry)
            for leftover in useless:
                remove_leftover(cache, leftover)
    freed = sum(e.disk_bytes for e in chosen) + sum(e.disk_bytes for e in useless)
    if as_json:
        document = {
            "dryRun": dry_run,
            "diskBytes": freed,
            "contents": [_described(entry) for entry in chosen],
            "leftovers": [asdict(leftover) for leftover in useless],
        }
        click.echo(json.dumps(document, indent=2))
        return
    for leftover in useless:
        click.echo(f"{leftover.name}: {leftover.why}")
    verb = "would be removed" if dry_run else "removed"
    click.echo(
        f"{len(chosen)} contents and {len(useless)} leftovers {verb}, {bytes_text(freed)} on disk"
    )


def _used_indexes(cache: Cache, root: str) -> set[str]:
    """Indexes of the layers that are mounted; all if a slot cannot be read, as it may need any."""
    used = names_in_use(root)
    if used is None:
        click.echo("no index is removed: a slot cannot be read", err=True)
        return set(os.listdir(cache.index))
    return used
