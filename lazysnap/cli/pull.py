# SPDX-License-Identifier: Apache-2.0
"""`lazysnap pull`: its options. The rest, which takes longer to load, is in `pulling`."""

from __future__ import annotations

import platform as machine

import click

from lazysnap import places
from lazysnap.platforms import Platform
from lazysnap.pull.announcement import announce
from lazysnap.reference import Reference

_MACHINES = {"armv6l": "arm/v6", "armv7l": "arm/v7"}
"""uname's names that are not architecture names of OCI, nor known to `Platform` as another's."""
_OTHERS = frozenset({"overlayfs", "native"})
"""Snapshotters of containerd that are no concern of the daemon."""


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "--address", default=places.CONTAINERD, envvar="CONTAINERD_ADDRESS", show_default=True,
    metavar="SOCKET", help="containerd's socket.",
)  # fmt: skip
@click.option(
    "--namespace", "-n", default="default", envvar="CONTAINERD_NAMESPACE", show_default=True,
    help="containerd's namespace; Kubernetes uses k8s.io.",
)  # fmt: skip
@click.option(
    "--snapshotter", default="lazysnap", show_default=True,
    help="Name of the snapshotter in containerd's configuration.",
)  # fmt: skip
@click.option(
    "--root", default=places.ROOT, envvar="LAZYSNAP_ROOT", show_default=True, metavar="DIR",
    help="lazysnap's root directory, where its daemon is told of the image.",
)  # fmt: skip
@click.option("--plain-http", is_flag=True, help="Speak HTTP without TLS to the registry.")
@click.option(
    "--platform", metavar="OS/ARCH[/VARIANT]", help="Platform; by default this machine's."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Log to standard error.")
def command(
    reference: str,
    address: str,
    namespace: str,
    snapshotter: str,
    root: str,
    plain_http: bool,
    platform: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Pull the image REF into containerd; lazy layers are mounted, not downloaded."""
    parsed = Reference.parse(reference)
    wanted = Platform.parse(platform or _host_platform())
    announcement = None if snapshotter in _OTHERS else announce(root, parsed, wanted)
    # Only now, as this takes a quarter of a second, in which the daemon gets on.
    from lazysnap import log
    from lazysnap.cli import pulling

    log.setup("debug" if debug else "warning")
    pulling.run(
        announcement,
        parsed,
        wanted,
        address=address,
        namespace=namespace,
        snapshotter=snapshotter,
        plain_http=plain_http,
        as_json=as_json,
    )


def _host_platform() -> str:
    name = machine.machine()
    return f"linux/{_MACHINES.get(name, name)}"
