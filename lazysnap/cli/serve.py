# SPDX-License-Identifier: Apache-2.0
"""`lazysnap serve`: the daemon that containerd talks to."""

from __future__ import annotations

import click
import msgspec
import trio

from lazysnap import config, config_file, log
from lazysnap.cli.options import config_option, root_option


@click.command()
@config_option
@root_option
@click.option("--address", type=click.Path(), help="Socket that containerd connects to.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much to log."
)
@click.option(
    "--unmount-on-exit",
    is_flag=True,
    help="Unmount everything when stopping. Containers that use the mounts break.",
)
@click.option(
    "--shard-slice",
    default="",
    metavar="SLICE",
    help="Start shards in scopes of this systemd slice, apart from the daemon.",
)
def command(
    config_path: str | None,
    root: str | None,
    address: str | None,
    log_level: str | None,
    unmount_on_exit: bool,
    shard_slice: str,
) -> None:
    """Serve snapshots to containerd until SIGTERM.

    Options override the configuration file (default: /etc/lazysnap/config.toml), which is read again
    at SIGHUP. Mounted layers go on working when the daemon stops, and the next daemon finds them.

    \b
    Examples:
      lazysnap serve
      lazysnap serve --config config.toml --log-level debug
    """
    given = {"root": root, "address": address, "log_level": log_level}

    def load() -> config.Config:
        settings = config_file.load(config_path)
        return msgspec.structs.replace(settings, **{k: v for k, v in given.items() if v})

    settings = load()
    log.setup(settings.log_level, settings.log_format)
    from lazysnap import daemon  # after the options are known to be right: it loads grpc

    async def serve() -> None:
        await daemon.run(load, unmount_on_exit=unmount_on_exit, shard_slice=shard_slice)

    trio.run(serve)
