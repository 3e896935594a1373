# SPDX-License-Identifier: Apache-2.0
"""What this process has counted: numbers and durations by name and label.

A *sample* is all of that at one moment, in types that msgpack knows: name, label, then a list of numbers
that only grow. A counter is a list of one; a histogram has the counts of its buckets, then the sum of
what was observed. Does no I/O.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper bounds of the buckets of all histograms, in seconds; a last bucket has what is longer."""

Sample = dict[str, dict[str, list[float]]]

OTHER = "other"
_MOST_LABELS = 100


class Counts:
    """Counters and histograms; all methods but those of a list may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Sample = {}

    def add(self, name: str, label: str = "", amount: float = 1) -> None:
        """Count something.

        Args:
            name: of `families.FAMILIES`.
            label: value of the family's label, or several joined by commas. When there are too many,
                the others are counted together.
            amount: how much is added.
        """
        with self._lock:
            self._values_of(name, label, 1)[0] += amount

    def counter(self, name: str, label: str = "") -> list[float]:
        """The one number of a counter, for those who count so often that a call would count."""
        with self._lock:
            return self._values_of(name, label, 1)

    def histogram(self, name: str, label: str = "") -> list[float]:
        """The numbers of a histogram, for those who observe so often that a call would count.

        They do `numbers[bisect_left(BOUNDS, seconds)] += 1; numbers[-1] += seconds`, from one thread.
        """
        with self._lock:
            return self._values_of(name, label, len(BOUNDS) + 2)

    def observe(self, name: str, label: str, seconds: float) -> None:
        """Note how long something took."""
        with self._lock:
            numbers = self._values_of(name, label, len(BOUNDS) + 2)
            numbers[bisect_left(BOUNDS, seconds)] += 1
            numbers[-1] += seconds

    @contextmanager
    def timing(self, name: str, label: str = "") -> Iterator[None]:
        """Note how long the body takes, however it ends."""
        began = monotonic()
        try:
            yield
        finally:
            self.observe(name, label, monotonic() - began)

    def sample(self) -> Sample:
        """A copy of everything."""
        with self._lock:
            return {
                name: {label: list(numbers) for label, numbers in labels.items()}
                for name, labels in self._values.items()
            }

    def _values_of(self, name: str, label: str, length: int) -> list[float]:
        labels = self._values.setdefault(name, {})
        if label not in labels and len(labels) >= _MOST_LABELS:
            label = OTHER
        return labels.setdefault(label, [0.0] * length)


counts = Counts()
"""Of this process."""
