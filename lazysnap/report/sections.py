# SPDX-License-Identifier: Apache-2.0
"""Divides what happened into pictures: each with an axis on which something happens all the time. Pure.

A pull and the starts of containers may be days apart, and the background goes on long after a start is
over; on one axis nothing could be told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lazysnap.report.model import Container, Range, Report, Wait

_IDLE_SECONDS = 10.0
# What follows the last wait becomes a picture of its own if it takes so many times as long.
_TAIL = 3.0
_ROWS_MOST = 300


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar in a row.

    Attributes:
        at: seconds since the report's zero.
        seconds: how long.
        kind: mounting, range or wait.
        number: position among those of its kind in the report.
    """

    at: float
    seconds: float
    kind: str
    number: int

    @property
    def end(self) -> float:
        """When it ends."""
        return self.at + self.seconds


@dataclass(slots=True)
class Row:
    """A file, or the layer itself.

    Attributes:
        layer: position of the layer.
        file: empty for the layer itself; None for all files that have no row of their own.
        bars: by time.
    """

    layer: int
    file: str | None
    bars: list[Bar] = field(default_factory=list)


@dataclass(slots=True)
class Section:
    """One picture.

    Attributes:
        begin: seconds since the report's zero.
        end: seconds since the report's zero.
        rows: by the time of their first bar.
        containers: that were prepared in between.
    """

    begin: float
    end: float
    rows: list[Row]
    containers: list[Container]


def sections(report: Report) -> list[Section]:
    """All that has a time, in pictures; every bar is in one of them."""
    bars = sorted(_bars(report), key=lambda bar: bar.at)
    left = list(report.containers)
    found = []
    for group in _groups(bars):
        begin, end = group[0].at, max(bar.end for bar in group)
        marked = [each for each in left if begin - _IDLE_SECONDS < each.at <= end]
        left = [each for each in left if each not in marked]
        begin = min([begin, *(each.at for each in marked)])
        found.append(Section(begin, end, _rows(report, group), marked))
    return found


def _bars(report: Report) -> Iterable[Bar]:
    for number, layer in enumerate(report.layers):
        if layer.ready_at is not None:
            begin = layer.ready_at if layer.mounting_at is None else layer.mounting_at
            yield Bar(begin, layer.ready_at - begin, "mounting", number)
    for number, each in enumerate(report.ranges):
        yield Bar(each.at, each.seconds, "range", number)
    for number, wait in enumerate(report.waits):
        yield Bar(wait.at, wait.seconds, "wait", number)


def _groups(bars: Sequence[Bar]) -> Iterable[list[Bar]]:
    group: list[Bar] = []
    until = 0.0
    for bar in bars:
        if group and bar.at > until + _IDLE_SECONDS:
            yield from _without_tail(group)
            group = []
        until = max(until, bar.end) if group else bar.end
        group.append(bar)
    if group:
        yield from _without_tail(group)


def _without_tail(group: list[Bar]) -> Iterable[list[Bar]]:
    """What comes long after the last wait or mount, when only the background went on."""
    begin, end = group[0].at, max(bar.end for bar in group)
    last = max((bar.end for bar in group if bar.kind != "range"), default=end)
    if end - last > _TAIL * max(last - begin, 1.0):
        tail = [bar for bar in group if bar.at > last]
        if tail:
            yield [bar for bar in group if bar.at <= last]
            yield tail
            return
    yield group


def _rows(report: Report, bars: Iterable[Bar]) -> list[Row]:
    rows: dict[tuple[int, str | None], Row] = {}
    for bar in bars:
        layer, file = _place(report, bar)
        if (layer, file) not in rows and len(rows) >= _ROWS_MOST:
            file = None
        rows.setdefault((layer, file), Row(layer, file)).bars.append(bar)
    return list(rows.values())


def _place(report: Report, bar: Bar) -> tuple[int, str | None]:
    if bar.kind == "mounting":
        return bar.number, ""
    several: Sequence[Range | Wait] = report.ranges if bar.kind == "range" else report.waits
    return several[bar.number].layer, several[bar.number].file
