# SPDX-License-Identifier: Apache-2.0
"""Reads the configuration file, and says what is wrong with it: which key, on which line.

An unknown key is an error that names the nearest known one, so that a slip is not silently ignored.
What the keys are is declared in `lazysnap.config`.
"""

from __future__ import annotations

import difflib
import re
import tomllib

import msgspec

from lazysnap.config import Config, all_keys, sections
from lazysnap.errors import ConfigError

DEFAULT_PATH = "/etc/lazysnap/config.toml"


def load(path: str | None) -> Config:
    """Read the configuration file.

    Args:
        path: a file that must be there; None for the default one, which need not be.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    text = read(path)
    return Config() if text is None else parse(text, path or DEFAULT_PATH)


def read(path: str | None) -> str | None:
    """The text of the configuration file; None if there is none and need not be.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path or DEFAULT_PATH, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError as error:
        if path is None:
            return None
        raise ConfigError(f"there is no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path or DEFAULT_PATH} cannot be read: {error}") from error


def parse(text: str, where: str) -> Config:
    """Read a configuration.

    Args:
        text: TOML.
        where: how errors name it.

    Raises:
        ConfigError: it is not TOML, has an unknown key, or a value of the wrong kind or size. The
            message names the line if it can be found.
    """
    try:
        return msgspec.convert(tomllib.loads(text), Config)
    except tomllib.TOMLDecodeError as error:
        at = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        place, what = (f"{where}:{at[2]}", at[1]) if at else (where, error)
        raise ConfigError(f"{place}: {what}") from error
    except msgspec.ValidationError as error:
        raise _explained(str(error), text, where) from error


def _explained(message: str, text: str, where: str) -> ConfigError:
    """The error for what msgspec says: `what - at $.path`, or with "unknown field `name`"."""
    what, _, at = message.partition(" - at ")
    path = re.sub(r"\[.*", "", at.strip("`").removeprefix("$").removeprefix("."))
    unknown = re.search(r"unknown field `(.+?)`", what)
    if unknown is not None:
        section, path = path, f"{path}.{unknown[1]}" if path else unknown[1]
        line = line_of(text, path)
        place = f"{where}:{line}" if line else where
        return ConfigError(f"{place}: there is no key {path}", hint=_near(section, unknown[1]))
    line = line_of(text, path)
    place = f"{where}:{line}" if line else where
    what = what[:1].lower() + re.sub(r" matching regex .*", " of another form", what[1:])
    hints = [f"{key.path}: {key.description}" for key in all_keys() if key.path == path]
    return ConfigError(
        f"{place}: {path}: {what.replace('`', '')}" if path else f"{place}: {what}",
        hint=hints[0] if hints else "`lazysnap config default` explains all keys",
    )


def _near(section: str, name: str) -> str:
    known = {key.path: key.name for key in all_keys()} | {s: s for s, _ in sections() if s}
    here = [own for path, own in known.items() if path == (f"{section}.{own}" if section else own)]
    near = difflib.get_close_matches(name, here, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    elsewhere = difflib.get_close_matches(name, list(known.values()), n=1, cutoff=0.8)
    found = [path for path, own in known.items() if elsewhere and own == elsewhere[0]]
    return f"did you mean {found[0]!r}?" if found else f"known here: {', '.join(sorted(here))}"


def line_of(text: str, path: str) -> int | None:
    """The line on which a key is set, or its table begins; None if it cannot be told.

    Args:
        text: TOML that can be read.
        path: full name of the key or table.
    """
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if header := re.match(r"\[\[?\s*([^\[\]]+?)\s*\]", stripped):
            table = re.sub(r"[\s\"']", "", header[1])
            if table == path:
                return number
        elif assigned := re.match(r"([A-Za-z0-9_.\-\"' ]+?)\s*=", stripped):
            name = re.sub(r"[\s\"']", "", assigned[1])
            full = f"{table}.{name}" if table else name
            # An inline table sets all that is in it.
            if full == path or path.startswith(f"{full}."):
                return number
    return None
