# SPDX-License-Identifier: Apache-2.0
"""`lazysnap store`: the additional layer store that Podman and CRI-O use."""

from __future__ import annotations

import click
import msgspec
import trio

from lazysnap import config, config_file, log, paths
from lazysnap.cli.options import config_option


@click.command()
@config_option
@click.option(
    "--root",
    type=click.Path(),
    default=paths.DEFAULT_STORE_ROOT,
    show_default=True,
    help="Directory of all state, not the one of lazysnap serve.",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much to log."
)
@click.option(
    "--metrics-address",
    default="",
    metavar="ADDRESS",
    help="Serve metrics for Prometheus here: HOST:PORT or unix:PATH.",
)
@click.option(
    "--unmount-on-exit",
    is_flag=True,
    help="Unmount everything when stopping. Containers that use the mount break.",
)
@click.option(
    "--shard-slice",
    default="",
    metavar="SLICE",
    help="Start the serving process in a scope of this systemd slice, apart from the daemon.",
)
def command(
    config_path: str | None,
    root: str,
    log_level: str | None,
    metrics_address: str,
    unmount_on_exit: bool,
    shard_slice: str,
) -> None:
    """Serve lazy layers to Podman, Buildah and CRI-O until SIGTERM.

    Clients find layers in ROOT/store, which /etc/containers/storage.conf has to name:

    \b
      [storage.options]
      additionallayerstores = ["/var/lib/lazysnap-store/store:ref"]

    The configuration file is that of lazysnap serve (default: /etc/lazysnap/config.toml), and read again
    at SIGHUP; its root, address and metrics_address are not used. Containers go on reading when the store
    stops.

    \b
    Example:
      lazysnap store
    """
    given = {"root": root, "metrics_address": metrics_address}
    if log_level:
        given["log_level"] = log_level

    def load() -> config.Config:
        return msgspec.structs.replace(config_file.load(config_path), **given)

    settings = load()
    log.setup(settings.log_level, settings.log_format)
    from lazysnap.layerstore import serving  # after the options are known to be right

    async def serve() -> None:
        await serving.run(load, unmount_on_exit=unmount_on_exit, shard_slice=shard_slice)

    trio.run(serve)
