# SPDX-License-Identifier: Apache-2.0
"""The command line: one module for each command.

`main` loads only the module of the command that is run, so that `lazysnap --version` or a pull need
not load pyfuse3. It alone turns errors into messages and exit codes: those of `lazysnap.errors` by
their class, signals by 128 plus their number; anything else is a defect and shows its trace.

To add a command: a module here with a click command called `command`, and a line in `_SECTIONS`.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from lazysnap import __version__
from lazysnap.cli.groups import Group
from lazysnap.errors import LazysnapError

_SECTIONS = {
    "Daemons": {
        "serve": "Run the daemon that containerd talks to.",
        "store": "Run the layer store that Podman and CRI-O use.",
    },
    "Images": {
        "pull": "Pull an image into containerd without downloading lazy layers.",
        "mount": "Mount a whole image at a directory, without a daemon.",
        "umount": "Unmount what `lazysnap mount` has mounted.",
        "drain": "Fetch the rest of lazy images, so that they need no network.",
        "profile": "Record and share what an image reads while it starts.",
    },
    "State and trouble": {
        "status": "Show images and layers, and how much of them is local.",
        "check": "Find what keeps lazysnap from working, and say what to do.",
        "report": "Show how an image started, and what held it up.",
        "cache": "Show, verify and prune the cache on disk.",
        "config": "Show and check the configuration.",
    },
}
"""The commands in the order of `lazysnap --help`: name, which is also the module's here, and its line."""
_COMMANDS = {name: line for section in _SECTIONS.values() for name, line in section.items()}


class _LazyGroup(Group):
    """A click group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"lazysnap.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()), col_max=max(map(len, _COMMANDS)))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LazysnapError as error:
            click.echo(f"lazysnap: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="COMMAND [OPTIONS] [ARGS]...",
    epilog="Exit status: 0 success; 1 an error; 2 wrong use, or a wrong configuration; 130 after"
    " Ctrl-C; 143 after SIGTERM. Commands for which 1 or 2 mean something else say so in their help.",
)
@click.version_option(__version__, prog_name="lazysnap", message="%(prog)s %(version)s")
def main() -> None:
    """Mounts container images instead of downloading them.

    Errors go to standard error, with a hint what to do. `lazysnap COMMAND --help` explains a command.

    \b
    Examples:
      lazysnap check
      lazysnap pull registry.example/app:1
      lazysnap mount registry.example/app:1 /mnt
    """
