# SPDX-License-Identifier: Apache-2.0
"""`lazysnap config`: show what is in force, print a commented sample, check a file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator

import click

from lazysnap import config, config_file
from lazysnap.cli import config_reference
from lazysnap.cli.config_reference import toml
from lazysnap.cli.groups import Group
from lazysnap.cli.options import config_option
from lazysnap.config import Config, Key

_WIDTH = 100
_COLUMN = 34


@click.group(cls=Group)
def command() -> None:
    """Show and check the configuration.

    \b
    Examples:
      lazysnap config show
      lazysnap config check config.toml
    """


@command.command("show")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(config_path: str | None, as_json: bool) -> None:
    """Print the value of each key, and the line of the file that sets it.

    \b
    Example:
      lazysnap config show --json
    """
    settings = config_file.load(config_path)
    where = config_path or config_file.DEFAULT_PATH
    origins = _origins(config_file.read(config_path) or "", where)
    if as_json:
        document = {
            key.path: {
                "value": key.value(settings),
                "default": key.default,
                "origin": origins.get(key.path, "default"),
                "reloads": key.reloads,
            }
            for key in config.all_keys()
        }
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo("\n".join(_effective(settings, origins)))


@command.command("default")
@click.option("--markdown", is_flag=True, help="Print the reference in docs/configuration.md.")
def default(markdown: bool) -> None:
    """Print a commented file with all keys and their defaults.

    \b
    Example:
      lazysnap config default >/etc/lazysnap/config.toml
    """
    click.echo("\n".join(config_reference.markdown() if markdown else sample()))


@command.command("check", short_help="Say what is wrong with a file.")
@click.argument("file", required=False, type=click.Path())
def check(file: str | None) -> None:
    """Say whether FILE can be used, and if not, what is wrong with it, and where.

    Exit status: 0 if it can be used, 2 if not.

    \b
    Example:
      lazysnap config check config.toml
    """
    path = file or config_file.DEFAULT_PATH
    config_file.load(path)
    click.echo(f"{path}: good")


def sample() -> Iterator[str]:
    """Lines of a configuration file with all keys, each set to its default and explained."""
    yield "# The configuration of lazysnap: all keys with their defaults."
    yield "# Those marked with * follow a changed file at SIGHUP (systemctl reload lazysnap)."
    for section, kind in config.sections():
        yield ""
        if section:
            yield f"# {(kind.__doc__ or '').strip()}"
            yield f"[{section}]"
        for key in config.all_keys():
            if key.section == section:
                yield from _explained(key)


def _explained(key: Key) -> Iterator[str]:
    line = f"{key.name} = {toml(key.default)}"
    comment = f"# {'* ' if key.reloads else ''}{key.description}"
    if len(line) < _COLUMN and _COLUMN + len(comment) <= _WIDTH:
        yield f"{line:{_COLUMN}}{comment}"
    else:
        yield comment
        yield line


def _effective(settings: Config, origins: dict[str, str]) -> Iterator[str]:
    section = ""
    for key in config.all_keys():
        if key.section != section:
            section = key.section
            yield ""
            yield f"[{section}]"
        line = f"{key.name} = {toml(key.value(settings))}"
        yield f"{line:{_COLUMN - 1}} # {origins.get(key.path, 'default')}"


def _origins(text: str, where: str) -> dict[str, str]:
    """Where the keys that a file has are set, by full name."""
    document = tomllib.loads(text)
    found = {}
    for key in config.all_keys():
        table = document.get(key.section, {}) if key.section else document
        if key.name in table:
            line = config_file.line_of(text, key.path)
            found[key.path] = f"{where}:{line}" if line else where
    return found
