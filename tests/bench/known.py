# SPDX-License-Identifier: Apache-2.0
"""A cold start when it is known what the image reads while it starts; and what to aim at.

The profile is recorded before in another scene: nothing but the profile is there when the pull begins.
The goal is a quarter more than the least that is possible: the chunks that the start touches over the
line, three round trips, and the start-up of a container under overlayfs with everything local.
"""

from __future__ import annotations

import json
import time
from functools import partial

from fixtures.images import catalogue
from fixtures.images.catalogue import Built

from . import touched
from .origin import NETWORKS
from .plan import Measure, Values
from .scene import OVERLAYFS, Scene
from .start import FORMS, GCC, PY, start

_SLACK = 1.25
_ROUND_TRIPS = 3


class _Known:
    """What is known of one image and command, and of the round of runs that is under way."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._profile = b""
        self._touched_bytes = 0
        self._local: float | None = None

    def learn(self, scene: Scene, image: Built) -> None:
        """Record the profile, and look how much it is in the registry."""
        scene.pull(image)
        self._profile = scene.record(image, self._command)
        self._touched_bytes = sum(
            touched.compressed_bytes(scene.origin.blob(digest), reads)
            for digest, reads in json.loads(self._profile)["layers"].items()
        )

    def run(self, scene: Scene, image: Built) -> Values:
        """Overlayfs comes before lazysnap in each round, and says what a local start takes."""
        if scene.side.name == OVERLAYFS:
            values = start(scene, image, self._command)
            again = time.monotonic()
            self._local = scene.start(image, self._command, "ok") - again
            return {**values, "image local [s]": self._local}
        scene.know(self._profile)
        values = {**start(scene, image, self._command), "touched [MB]": self._touched_bytes / 1e6}
        if self._local is None:  # overlayfs is not measured
            return values
        network = scene.network
        line = self._touched_bytes / network.rate if network.rate else 0
        goal = _SLACK * (line + _ROUND_TRIPS * network.delay + self._local)
        return {**values, "goal: first output [s]": goal}


def _measure(name: str, repository: str, command: tuple[str, ...]) -> Measure:
    known = _Known(command)
    return Measure(
        f"known-{name}",
        f"{name}: cold start, profile known",
        partial(catalogue.build, repository, FORMS),
        known.run,
        tuple(NETWORKS),
        learn=known.learn,
    )


MEASURES = [_measure("py", "py-full", PY), _measure("gcc", "gcc", GCC)]
