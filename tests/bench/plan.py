# SPDX-License-Identifier: Apache-2.0
"""What a measurement is. Knows none of them; `__main__` collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fixtures.images import catalogue, forms
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
        form: Of the image, for all sides; empty for the one that each side is made for.
        optimised_for: The command for which peers get the image rebuilt, instead of that form.
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
    optimised_for: tuple[str, ...] = ()
    config: str = ""

    def skips(self, side: Side) -> bool:
        """Whether a side is not measured."""
        return self.lazy_only and side.name == OVERLAYFS

    def form_for(self, side: Side) -> str:
        """The form of the image that a side pulls."""
        if self.optimised_for and side.name not in (OVERLAYFS, LAZYSNAP):
            return forms.OPTIMISED
        return self.form or side.form

    def prepare(self, sides: Iterable[Side]) -> Built:
        """Make the image, or find it made, in the forms that sides pull."""
        image = self.image()
        if any(self.form_for(side) == forms.OPTIMISED for side in sides if not self.skips(side)):
            image = catalogue.optimised(image, self.optimised_for)
        return image


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
