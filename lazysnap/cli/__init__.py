# SPDX-License-Identifier: Apache-2.0
"""The command line: one module for each command.

`main` loads only the module of the command that is run, so that `lazysnap --version` or a pull need
not load pyfuse3. It alone turns errors into messages and exit codes: those of `lazysnap.errors` by
their class, signals by 128 plus their number; anything else is a defect and shows its trace.

To add a command: a module here with a click command called `command`, and a line in `_COMMANDS`.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from lazysnap import __version__
from lazysnap.errors import LazysnapError

_COMMANDS = {
    "cache": "Look at, check and empty the cache on disk.",
    "check": "Find what keeps lazysnap from working, and say what to do.",
    "config": "Show and check the configuration.",
    "drain": "Fetch everything of lazy images, so that they need no network.",
    "mount": "Mount a whole image at a directory, without a daemon.",
    "profile": "Learn what an image reads while it starts.",
    "pull": "Pull an image into containerd without downloading lazy layers.",
    "report": "Show how an image started, and what held it up.",
    "serve": "Run the snapshotter.",
    "status": "Show what is mounted and how much of it is local.",
    "store": "Serve lazy layers to Podman and CRI-O.",
    "umount": "Unmount what `lazysnap mount` has mounted.",
}
"""Name, which is also the module's name here, and the line for `lazysnap --help`."""


class _LazyGroup(click.Group):
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
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name]) for name in self.list_commands(ctx)])

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


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazysnap", message="%(prog)s %(version)s")
def main() -> None:
    """Mounts container images instead of downloading them."""
