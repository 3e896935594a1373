# SPDX-License-Identifier: Apache-2.0
"""Draws what happened as bars over time, as SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.etree.ElementTree import Element

from lazysnap.quantities import bytes_text
from lazysnap.report.markup import element
from lazysnap.report.model import Report
from lazysnap.report.sections import Bar, Row, Section
from lazysnap.report.words import layer_text, seconds_text

_LABELS = 340.0
_CHART = 860.0
_ROW = 18.0
_TOP = 26.0
_NAME_MOST = 46
_TICKS = 8
_TICK_TEXT = 60.0
_LEAST_WIDTH = 2.0
_MARGIN = 8.0


def waterfall(report: Report, section: Section) -> Element:
    """A picture of one section.

    Args:
        report: what its bars are of.
        section: one of `sections(report)`.
    """
    height = _TOP + _ROW * len(section.rows) + _MARGIN
    axis = _Axis(section.begin, section.end)
    drawing = element(
        "svg",
        viewBox=f"0 0 {_LABELS + _CHART + _MARGIN:.0f} {height:.0f}",
        role="img",
        aria_label=f"what happened from {seconds_text(section.begin)} on",
    )
    drawing.extend(_grid(axis, height))
    for number, row in enumerate(section.rows):
        drawing.extend(_row(report, axis, row, _TOP + _ROW * number))
    for container in section.containers:
        x = axis.x(container.at)
        line = element("line", x1=x, x2=x, y1=_TOP - 6, y2=height, class_="container")
        line.append(element("title", f"{container.key} at {seconds_text(container.at)}"))
        drawing.append(line)
    return drawing


class _Axis:
    """Of time, from left to right."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin = begin
        self.seconds = max(end - begin, 0.001)

    def x(self, at: float) -> float:
        """Where a time is."""
        return _LABELS + (at - self.begin) / self.seconds * _CHART

    def ticks(self) -> Iterable[float]:
        """Round times, not too many; since the beginning."""
        rough = self.seconds / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        return (step * n for n in range(int(self.seconds / step) + 1))


def _grid(axis: _Axis, height: float) -> Iterable[Element]:
    for tick in axis.ticks():
        x = axis.x(axis.begin + tick)
        yield element("line", x1=x, x2=x, y1=_TOP - 6, y2=height, class_="grid")
        if x <= _LABELS + _CHART - _TICK_TEXT:
            yield element("text", f"+{seconds_text(tick)}", x=x + 2, y=12, class_="tick")


def _row(report: Report, axis: _Axis, row: Row, top: float) -> Iterable[Element]:
    full = _name(report, row)
    short = full if len(full) <= _NAME_MOST else "…" + full[1 - _NAME_MOST :]
    yield element("text", short, element("title", full), x=_LABELS - 8, y=top + 12.5, class_="name")
    for bar in row.bars:
        yield _bar(report, axis, bar, top)


def _name(report: Report, row: Row) -> str:
    layer = layer_text(report.layers[row.layer], row.layer)
    if row.file is None:
        return f"other files of {layer}"
    return row.file or f"{layer} is mounted"


def _bar(report: Report, axis: _Axis, bar: Bar, top: float) -> Element:
    x = axis.x(bar.at)
    width = max(bar.seconds / axis.seconds * _CHART, _LEAST_WIDTH)
    if bar.kind == "range":
        return _range(report, bar, x, top, width)
    if bar.kind == "wait":
        wait = report.waits[bar.number]
        title = (
            f"{wait.file}: a read of {bytes_text(wait.length)} at {wait.offset} waited"
            f" {seconds_text(wait.seconds)}"
            + (", prefetch was too late" if wait.ahead else ", nobody had asked for it")
        )
        return element(
            "rect",
            element("title", title),
            x=x,
            y=top + 11,
            width=width,
            height=5,
            class_="wait",
            data_wait=bar.number,
        )
    layer = report.layers[bar.number]
    title = f"{layer_text(layer, bar.number)}, until it was there: {seconds_text(bar.seconds)}"
    return element(
        "rect",
        element("title", title),
        x=x,
        y=top + 2,
        width=width,
        height=9,
        class_="mounting",
        data_layer=bar.number,
    )


def _range(report: Report, bar: Bar, x: float, top: float, width: float) -> Element:
    each = report.ranges[bar.number]
    also = f" and {each.more_files} more files" if each.more_files else ""
    parts = [
        f"{each.file}{also}",
        f"{each.kind}, {bytes_text(each.received)} of {bytes_text(each.length)} from the network",
        f"at {seconds_text(each.at)} for {seconds_text(each.seconds)}",
        f"{layer_text(report.layers[each.layer], each.layer)} from {each.offset}",
    ]
    flags = [each.kind]
    for name, said in (
        ("urgent", "a reader came to wait for it"),
        ("under_way", "not complete yet"),
        ("failed", "failed"),
    ):
        if getattr(each, name):
            flags.append(name.replace("_", "-"))
            parts.append(said)
    parts += each.files
    return element(
        "rect",
        element("title", " · ".join(parts)),
        x=x,
        y=top + 2,
        width=width,
        height=9,
        class_=f"range {' '.join(flags)}",
        data_range=bar.number,
    )
