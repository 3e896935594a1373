# SPDX-License-Identifier: Apache-2.0
"""Draws the starts of one image as a bar chart: from what `--json` writes to SVG, light and dark.

    python -m tests.bench.chart docs/benchmarks/start.json docs/images

writes `start-light.svg` and `start-dark.svg`. The same document always gives the same bytes. All but
`main` is pure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from .origin import NETWORKS
from .scene import LAZYSNAP, OVERLAYFS

_VALUE = "first output [s]"
_COLD = "start-"
_KNOWN = "known-"

_WIDTH = 820
_LABELS = 250
_NUMBERS = 64
_TOP = 46
_GROUP = 30
_ROW = 22
_BAR = 14
_BOTTOM = 30
_FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """The colours of a chart, which has no background of its own.

    Attributes:
        text: of titles and numbers.
        dim: of what is less important.
        other: the bars of other snapshotters.
        own: the bars of lazysnap.
    """

    text: str
    dim: str
    other: str
    own: str


LIGHT = Theme(text="#1f2328", dim="#59636e", other="#b5bdc6", own="#0969da")
DARK = Theme(text="#f0f6fc", dim="#9198a1", other="#535c66", own="#4493f8")


@dataclass(frozen=True)
class _Bar:
    label: str
    seconds: float
    own: bool


def chart(document: Mapping[str, Any], theme: Theme) -> str:
    """The starts in a document as SVG, a group of bars for each network.

    Args:
        document: as `report.document` makes it; medians are taken of several runs.
        theme: its colours.

    Raises:
        ValueError: it has no start, or starts of several images.
    """
    runs = [run for run in document["runs"] if _is_start(run)]
    images = {run["measure"].partition("-")[2] for run in runs}
    if len(images) != 1:
        raise ValueError(f"starts of one image are needed, not of {sorted(images)}")
    groups = [
        (title.title, bars)
        for title in NETWORKS.values()
        if (bars := list(_bars([run for run in runs if run["network"] == title.name])))
    ]
    height = _TOP + sum(_GROUP + _ROW * len(bars) for _, bars in groups) + _BOTTOM
    drawing = Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=str(_WIDTH), height=str(height),
        viewBox=f"0 0 {_WIDTH} {height}", role="img",
    )  # fmt: skip
    drawing.set("font-family", _FONT)
    (image,) = images
    SubElement(
        drawing, "title"
    ).text = f"Seconds from the start of a pull to the first output: {image}"
    _text(
        drawing,
        0,
        20,
        f"{image}: seconds from the start of the pull to the first output",
        theme.text,
        15,
    )
    longest = max(bar.seconds for _, bars in groups for bar in bars)
    scale = (_WIDTH - _LABELS - _NUMBERS) / longest
    top = _TOP
    for title, bars in groups:
        _text(drawing, 0, top + 16, f"network: {title}", theme.dim, 12)
        top += _GROUP
        for bar in bars:
            _draw(drawing, top, bar, scale, theme)
            top += _ROW
    _text(drawing, 0, top + 20, _machine(document["machine"]), theme.dim, 11)
    indent(drawing)
    return tostring(drawing, encoding="unicode") + "\n"


def _is_start(run: Mapping[str, Any]) -> bool:
    return run["measure"].startswith((_COLD, _KNOWN)) and _VALUE in run["values"]


def _bars(runs: Sequence[Mapping[str, Any]]) -> Iterator[_Bar]:
    """One for each way to start on one network; overlayfs knows nothing of starts, so has one."""
    ways = dict.fromkeys((run["measure"], run["side"]) for run in runs)
    for measure, side in sorted(ways, key=lambda way: way[0].startswith(_KNOWN)):
        if side == OVERLAYFS and measure.startswith(_KNOWN):
            continue
        values = [r["values"][_VALUE] for r in runs if (r["measure"], r["side"]) == (measure, side)]
        yield _Bar(_label(measure, side), median(values), side == LAZYSNAP)


def _label(measure: str, side: str) -> str:
    if not measure.startswith(_KNOWN):
        return side
    how = "start known by a profile" if side == LAZYSNAP else "image rebuilt for the start"
    return f"{side}, {how}"


def _machine(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, "
        f"containerd {facts['containerd']}"
    )


def _draw(drawing: Element, top: float, bar: _Bar, scale: float, theme: Theme) -> None:
    base = top + _BAR - 2
    color = theme.text if bar.own else theme.dim
    _text(drawing, _LABELS - 10, base, bar.label, color, 12, anchor="end")
    width = max(bar.seconds * scale, 1)
    SubElement(
        drawing, "rect", x=str(_LABELS), y=str(top), width=f"{width:.1f}", height=str(_BAR),
        rx="2", fill=theme.own if bar.own else theme.other,
    )  # fmt: skip
    _text(drawing, _LABELS + width + 6, base, f"{bar.seconds:#.3g}", theme.text, 12, bold=bar.own)


def _text(
    drawing: Element, x: float, y: float, text: str, color: str, size: int,
    *, anchor: str = "start", bold: bool = False,
) -> None:  # fmt: skip
    made = SubElement(drawing, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=color)
    made.set("font-size", str(size))
    if anchor != "start":
        made.set("text-anchor", anchor)
    if bold:
        made.set("font-weight", "600")
    made.text = text


def files(document: Mapping[str, Any], name: str) -> Iterable[tuple[str, str]]:
    """Names and contents of the two pictures of a document that is called `name`."""
    for variant, theme in (("light", LIGHT), ("dark", DARK)):
        yield f"{name}-{variant}.svg", chart(document, theme)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description="Draw the starts that --json has written.")
    parser.add_argument("document", type=Path, help="file that tests/bench/run --json has written")
    parser.add_argument("directory", type=Path, help="where the two pictures go")
    arguments = parser.parse_args()
    document = json.loads(arguments.document.read_text())
    for name, drawing in files(document, arguments.document.stem):
        (arguments.directory / name).write_text(drawing)


if __name__ == "__main__":
    main()
