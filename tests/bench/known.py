# SPDX-License-Identifier: Apache-2.0
"""A cold start when it is known what the image reads while it starts; and what to aim at.

Lazysnap knows it by a profile that was recorded before in another scene: nothing but the profile is
there when the pull begins. Peers know it by an image that was rebuilt for the command; ``optimised-*``
gives that image to lazysnap, and no profile.

The goal is a quarter more than the least that is possible: the chunks that the start touches over the
line, three round trips, and the start-up of a container under overlayfs with everything local.
"""

from __future__ import annotations

import json
import time
from functools import partial

from fixtures.images import catalogue, forms
from fixtures.images.catalogue import Built

from . import touched
from .origin import NETWORKS
from .plan import Measure, Values
from .scene import LAZYSNAP, OVERLAYFS, Scene
from .start import FORMS, GCC, PY, start

_SLACK = 1.25
_ROUND_TRIPS = 3


class _Known:
    """What is known of one image and command, and of the round of runs that is under way."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._profile = b""
        self._touched: dict[str, int] = {}
        self._local: float | None = None

    def learn(self, scene: Scene, image: Built) -> None:
        """Record the profile, and look how much it is in the registry."""
        scene.pull(image)
        self._profile = scene.record(image, self._command)
        layers = json.loads(self._profile)["layers"].items()
        sizes = {
            digest: touched.compressed_bytes(scene.origin.blob(digest), reads)
            for digest, reads in layers
        }
        self._touched = {digest: size for digest, size in sizes.items() if size}

    def run(self, scene: Scene, image: Built) -> Values:
        """Overlayfs comes before lazysnap in each round, and says what a local start takes."""
        if scene.side.name == OVERLAYFS:
            values = start(scene, image, self._command)
            again = time.monotonic()
            self._local = scene.start(image, self._command, "ok") - again
            return {**values, "image local [s]": self._local}
        if scene.side.name != LAZYSNAP:
            return start(scene, image, self._command)
        line = self._line(scene, image)
        scene.know(self._profile)
        values = {
            **start(scene, image, self._command),
            "touched [MB]": sum(self._touched.values()) / 1e6,
            "line [s]": line,
        }
        if self._local is None:  # overlayfs is not measured
            return values
        goal = _SLACK * (line + _ROUND_TRIPS * scene.network.delay + self._local)
        return {**values, "goal: first output [s]": goal}

    def _line(self, scene: Scene, image: Built) -> float:
        """Seconds that the touched bytes take on the network.

        One without a limit is as fast as curl gets so many bytes of the same blobs, just now.
        """
        if scene.network.rate:
            return sum(self._touched.values()) / scene.network.rate
        # In memory since the profile was recorded.
        return scene.origin.curl(image, scene.network, self._touched)


def _measures(name: str, repository: str, command: tuple[str, ...]) -> list[Measure]:
    known = _Known(command)
    image = partial(catalogue.build, repository, FORMS)
    networks = tuple(NETWORKS)
    return [
        Measure(
            f"known-{name}", f"{name}: cold start, profile known", image, known.run, networks,
            learn=known.learn, optimised_for=command,
        ),
        Measure(
            f"optimised-{name}", f"{name}: cold start, image optimised, no profile", image,
            partial(start, command=command), networks,
            lazy_only=True, form=forms.OPTIMISED, optimised_for=command,
        ),
    ]  # fmt: skip


MEASURES = [*_measures("py", "py-full", PY), *_measures("gcc", "gcc", GCC)]
