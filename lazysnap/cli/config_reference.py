# SPDX-License-Identifier: Apache-2.0
"""The reference of all keys of the configuration file, as Markdown: docs/configuration.md.

`lazysnap config default --markdown >docs/configuration.md` writes it; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lazysnap import config
from lazysnap.config_file import DEFAULT_PATH

_HEAD = f"""\
# Configuration

<!-- Written by `lazysnap config default --markdown`; change lazysnap/config.py instead. -->

The daemon reads `{DEFAULT_PATH}` (TOML), or the file that `--config` names. The file may be
missing, and so may each key in it. An unknown key or a wrong value is an error that names the line.

| command | what it does |
|---|---|
| `lazysnap config default` | prints a file with all keys, their defaults and a line of explanation |
| `lazysnap config show` | prints the values in force, and where each was set |
| `lazysnap config check FILE` | says whether a file can be used, and what is wrong with it |

A key that takes effect at a *reload* follows the changed file at SIGHUP (`systemctl reload
lazysnap`). The others take effect at a *restart* of the daemon (`systemctl restart lazysnap`).
Containers continue to read in both cases. Shards outlive the daemon, so `shards.max_background` and
`shards.read_ahead_kib` only reach those that are started afterwards."""

_COLUMNS = """\
| key | type | default | range | takes effect at | what it is for |
|---|---|---|---|---|---|"""


def markdown() -> Iterator[str]:
    """Lines of the reference."""
    yield from _HEAD.splitlines()
    for section, kind in config.sections():
        yield ""
        yield f"## {section}" if section else "## Top of the file"
        yield ""
        if section:
            yield f"The table `[{section}]`. {(kind.__doc__ or '').strip()}"
            yield ""
        yield from _COLUMNS.splitlines()
        for key in config.all_keys():
            if key.section == section:
                yield _row(key)


def _row(key: config.Key) -> str:
    cells = (
        f"`{key.name}`",
        key.kind,
        f"`{toml(key.default)}`",
        key.allowed,
        "reload" if key.reloads else "restart",
        key.description.replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def toml(value: Any) -> str:
    """A value in TOML; strings, numbers, booleans and lists of strings are alike in JSON."""
    return json.dumps(value, ensure_ascii=False)
