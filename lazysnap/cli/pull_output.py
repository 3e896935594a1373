# SPDX-License-Identifier: Apache-2.0
"""What `lazysnap pull` prints.

Progress goes to standard error (bars on a terminal, a line per event elsewhere), the result to
standard output, so that scripts can read the latter.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

import click

from lazysnap.oci import Descriptor
from lazysnap.pull.progress import LayerState, Progress, PullResult
from lazysnap.quantities import bytes_text


def show(result: PullResult, seconds: float, *, as_json: bool) -> None:
    """Print what became of a pull.

    Args:
        result: of the pull.
        seconds: that it took.
        as_json: print it as JSON.
    """
    click.echo(_as_json(result, seconds) if as_json else _as_text(result, seconds))


def _as_text(result: PullResult, seconds: float) -> str:
    lines = [
        f"{layer.digest[7:19]} {bytes_text(layer.size):>10} {layer.state}"
        + (f" ({layer.reason})" if layer.reason else "")
        for layer in result.layers
    ]
    lines.append(
        f"{result.reference}: {result.lazy_layers} of {len(result.layers)} layers lazy,"
        f" {bytes_text(result.bytes_downloaded)} downloaded in {seconds:.2f} s"
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


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Show the progress of a pull while the block lasts."""
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
        self._names = [f"{layer.digest[7:19]} {bytes_text(layer.size)}" for layer in layers]

    def state(self, layer: int, state: LayerState) -> None:
        if state not in self._SILENT:
            click.echo(
                f"layer {layer + 1}/{len(self._names)} {self._names[layer]}: {state}", err=True
            )
