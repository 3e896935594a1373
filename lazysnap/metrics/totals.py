# SPDX-License-Identifier: Apache-2.0
"""Adds up the samples of processes that come and go, so that no sum ever goes back.

A worker that was replaced is remembered by its last sample. A worker that is older than the daemon is
counted from the first sample on: all sums begin with the daemon, as Prometheus expects of a process.
Does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import add, sub

from lazysnap.metrics.counts import Sample


@dataclass
class _Place:
    """The process that was last seen at a place."""

    process: str
    offset: Sample
    last: Sample


class Totals:
    """Sums over all processes that were noted."""

    def __init__(self) -> None:
        self._gone: Sample = {}
        self._places: dict[int, _Place] = {}

    def note(self, place: int, process: str, sample: Sample, *, whole: bool) -> None:
        """Take a sample, newer than all before it from the same process.

        Args:
            place: where there is one process at a time, i.e. a shard.
            process: which one it is; differs from all others at this place.
            sample: everything that it has counted.
            whole: all of it counts; else only what comes after this sample, if it is the first.
        """
        known = self._places.get(place)
        if known is not None and known.process == process:
            known.last = sample
            return
        if known is not None:
            self._gone = _joined(self._gone, _joined(known.last, known.offset, sub), add)
        self._places[place] = _Place(process, {} if whole else sample, sample)

    def sum(self) -> Sample:
        """Everything that was counted."""
        result = self._gone
        for place in self._places.values():
            result = _joined(result, _joined(place.last, place.offset, sub), add)
        return result


def _joined(one: Sample, other: Sample, join: Callable[[float, float], float]) -> Sample:
    """Both samples, number by number; what only `one` has stays as it is.

    Lists of different lengths come from different releases and cannot be joined: the longer is kept.
    """
    result = {name: dict(labels) for name, labels in one.items()}
    for name, labels in other.items():
        mine = result.setdefault(name, {})
        for label, numbers in labels.items():
            ours = mine.get(label, [0.0] * len(numbers))
            if len(ours) == len(numbers):
                mine[label] = list(map(join, ours, numbers))
            else:
                mine[label] = max(ours, numbers, key=len)
    return result


def added(one: Sample, other: Sample) -> Sample:
    """The sum of two samples."""
    return _joined(one, other, add)
