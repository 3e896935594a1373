# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, so that all say the same of them."""

from __future__ import annotations

import click

from lazysnap import config_file

CONFIG_HELP = f"Configuration file (TOML).  [default: {config_file.DEFAULT_PATH}, if it is there]"
ROOT_HELP = "Directory of all of lazysnap's state.  [default: as in the configuration file]"

config_option = click.option("--config", "config_path", type=click.Path(), help=CONFIG_HELP)
"""`--config` as `config_path`: None if it was not given."""
root_option = click.option("--root", type=click.Path(), help=ROOT_HELP)
"""`--root`: None if it was not given."""
