# SPDX-License-Identifier: Apache-2.0
"""`lazysnap pull`: options in, progress and result out. What a pull is stands in `lazysnap.pull`.

Progress goes to standard error (bars on a terminal, a line per event elsewhere), the result to
standard output, so that scripts can read the latter.
"""

from __future__ import annotations

import contextlib
import json
import platform as machine
import sys
import time
from collections.abc import Iterator, Sequence

import click

from lazysnap import log
from lazysnap.cli import interrupt
from lazysnap.containerd.client import DEFAULT_ADDRESS, Containerd
from lazysnap.oci import Descriptor, Platform
from lazysnap.pull.progress import LayerState, Progress, PullResult
from lazysnap.pull.puller import pull
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry

_MACHINES = {"armv6l": "arm/v6", "armv7l": "arm/v7"}
"""uname's names that are not architecture names of OCI, nor known to `Platform` as another's."""


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "--address", default=DEFAULT_ADDRESS, envvar="CONTAINERD_ADDRESS", show_default=True,
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
    plain_http: bool,
    platform: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Pull the image REF into containerd; lazy layers are mounted, not downloaded."""
    log.setup("debug" if debug else "warning")
    parsed = Reference.parse(reference)
    wanted = Platform.parse(platform or _host_platform())

    async def work() -> PullResult:
        async with Containerd(address, namespace) as containerd, Registry() as registry:
            if plain_http:
                registry.allow_plain_http(parsed.host)
            with _progress() as progress:
                return await pull(parsed, containerd, registry, snapshotter, wanted, progress)

    start = time.monotonic()
    result = interrupt.run(work)
    seconds = time.monotonic() - start
    click.echo(_as_json(result, seconds) if as_json else _as_text(result, seconds))


def _host_platform() -> str:
    name = machine.machine()
    return f"linux/{_MACHINES.get(name, name)}"


def _as_text(result: PullResult, seconds: float) -> str:
    lines = [
        f"{layer.digest[7:19]} {_bytes(layer.size):>10} {layer.state}"
        + (f" ({layer.reason})" if layer.reason else "")
        for layer in result.layers
    ]
    lines.append(
        f"{result.reference}: {result.lazy_layers} of {len(result.layers)} layers lazy,"
        f" {_bytes(result.bytes_downloaded)} downloaded in {seconds:.2f} s"
    )
    return "\n".join(lines)


def _as_json(result: PullResult, seconds: float) -> str:
    document = {
        "reference": result.reference,
        "digest": result.digest,
        "manifest": result.manifest,
        "lazyLayers": result.lazy_layers,
        "totalLayers": len(result.layers),
        "bytesDownloaded": result.bytes_downloaded,
        "seconds": round(seconds, 3),
        "layers": [
            {
                "digest": layer.digest,
                "size": layer.size,
                "state": layer.state,
                "reason": layer.reason,
            }
            for layer in result.layers
        ],
    }
    return json.dumps(document, indent=2)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from lazysnap.cli.bars import bars  # rich takes a tenth of a second to load

    with bars() as shown:
        yield shown


class _Lines(Progress):
    """One line per change of a layer's state."""

    _SILENT = frozenset({LayerState.WAITING, LayerState.PREPARING})

    def __init__(self) -> None:
        self._names: list[str] = []

    def resolved(self, layers: Sequence[Descriptor]) -> None:
        self._names = [f"{layer.digest[7:19]} {_bytes(layer.size)}" for layer in layers]

    def state(self, layer: int, state: LayerState) -> None:
        if state not in self._SILENT:
            click.echo(
                f"layer {layer + 1}/{len(self._names)} {self._names[layer]}: {state}", err=True
            )
