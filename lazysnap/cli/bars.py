# SPDX-License-Identifier: Apache-2.0
"""The progress of a pull as bars on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from lazysnap.oci import Descriptor
from lazysnap.pull.progress import LayerState, Progress

_COLOURS = {LayerState.LAZY: "green", LayerState.PRESENT: "cyan", LayerState.UNPACKED: "blue"}


class _Shown(Progress):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: list[TaskID] = []

    def resolved(self, layers: Sequence[Descriptor]) -> None:
        for layer in layers:
            # an empty bar of length 0 would pulse
            task = self._bars.add_task(
                layer.digest[7:19], total=max(layer.size, 1), state=LayerState.WAITING.value
            )
            self._tasks.append(task)

    def state(self, layer: int, state: LayerState) -> None:
        colour = _COLOURS.get(state)
        text = f"[{colour}]{state}[/{colour}]" if colour else str(state)
        self._bars.update(self._tasks[layer], state=text)

    def received(self, layer: int, offset: int) -> None:
        self._bars.update(self._tasks[layer], completed=offset)


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Show bars on standard error while the block lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as shown:
        yield _Shown(shown)
