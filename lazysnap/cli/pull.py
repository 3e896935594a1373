# SPDX-License-Identifier: Apache-2.0
"""`lazysnap pull`: lets the daemon pull, or loads `pull_here` and pulls itself.

The daemon is asked before anything else, as it works while this process loads the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import click

from lazysnap import paths
from lazysnap.pull.daemon_ask import ask

_MACHINES = {"armv6l": "arm/v6", "armv7l": "arm/v7"}
"""uname's names that are not architecture names of OCI, nor known to `Platform` as another's."""
_OTHERS = frozenset({"overlayfs", "native"})
"""Snapshotters of containerd that are no concern of the daemon."""


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "--address", default=paths.CONTAINERD_ADDRESS, envvar="CONTAINERD_ADDRESS", show_default=True,
    metavar="SOCKET", help="containerd's socket.",
)  # fmt: skip
@click.option(
    "--namespace", "-n", default="default", envvar="CONTAINERD_NAMESPACE", show_default=True,
    metavar="NAME", help="containerd's namespace; Kubernetes uses k8s.io.",
)  # fmt: skip
@click.option(
    "--snapshotter", default="lazysnap", show_default=True, metavar="NAME",
    help="Name of the snapshotter in containerd's configuration.",
)  # fmt: skip
@click.option(
    "--root", default=paths.DEFAULT_ROOT, envvar="LAZYSNAP_ROOT", show_default=True, metavar="DIR",
    help="Directory of all of lazysnap's state, where its daemon is asked to pull.",
)  # fmt: skip
@click.option("--plain-http", is_flag=True, help="Speak HTTP without TLS to the registry.")
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Platform of the image.  [default: this machine's]",
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
    """Pull the image REF into containerd; lazy layers are mounted, not downloaded.

    The output tells for each layer whether it is lazy, and why not.

    \b
    Examples:
      lazysnap pull registry.example/app:1
      lazysnap pull -n k8s.io registry.example/app:1
    """
    began = time.monotonic()
    platform = platform or _host_platform()
    place = {"address": address, "namespace": namespace, "snapshotter": snapshotter}
    result = documents = None
    with _signals_exit():
        asked = None
        if snapshotter not in _OTHERS:
            there = {**place, "address": os.path.abspath(address)}
            asked = ask(root, reference, platform, **there)
        # Only now, as the daemon is at work meanwhile.
        from lazysnap import log
        from lazysnap.cli import pull_by_daemon, pull_output

        log.setup("debug" if debug else "warning")
        if asked is not None:
            result, documents = pull_by_daemon.follow(asked)
    if result is None:
        # Only now, as this takes a quarter of a second.
        from lazysnap.cli import pull_here

        result = pull_here.run(documents, reference, platform, **place, plain_http=plain_http)
    pull_output.show(result, time.monotonic() - began, as_json=as_json)


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """End the block at a signal, with the exit code that `interrupt` has for it."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _host_platform() -> str:
    name = os.uname().machine
    return f"linux/{_MACHINES.get(name, name)}"
