# SPDX-License-Identifier: Apache-2.0
"""What a measurement is. Knows none of them; `__main__` collects them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fixtures.images.catalogue import Built

from .scene import LAZYSNAP, OVERLAYFS, Scene, Side

Values = dict[str, float]
"""What one run measured: by name with the unit in brackets, as "first output [s]"."""


@dataclass(frozen=True)
class Measure:
    """One kind of measurement, repeatable by its name.

    Attributes:
        name: For ``--only``.
        title: In tables.
        image: Makes the image it needs, or finds it made.
        run: Measures, in a fresh scene.
        networks: Names of the networks over which it says something.
        lazy_only: Whether it has no meaning for overlayfs, which has everything after the pull.
        learn: Done once before the runs, in a scene of its own with lazysnap, to know something.
            Peers have no such thing and are not measured.
        form: Of the image, for all sides; empty for the one that each side is made for.
        config: What stands in lazysnap's configuration file.
    """

    name: str
    title: str
    image: Callable[[], Built]
    run: Callable[[Scene, Built], Values]
    networks: tuple[str, ...] = ("unlimited",)
    lazy_only: bool = False
    learn: Callable[[Scene, Built], None] | None = None
    form: str = ""
    config: str = ""

    def skips(self, side: Side) -> bool:
        """Whether a side is not measured."""
        if side.name == OVERLAYFS:
            return self.lazy_only
        return self.learn is not None and side.name != LAZYSNAP


@dataclass(frozen=True)
class Run:
    """One run of a measurement on one side.

    Attributes:
        measure: Name of the measurement.
        network: Name of the network.
        side: Name of the snapshotter.
        values: What was measured; empty if it failed.
        error: Why it failed, or empty.
        load: Load average of the last minute before the run.
    """

    measure: str
    network: str
    side: str
    values: Mapping[str, float]
    error: str
    load: float
