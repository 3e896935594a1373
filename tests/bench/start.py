# SPDX-License-Identifier: Apache-2.0
"""From the start of the pull to the first output, cold; and a second container, all local.

The second one has to do without the registry and the page cache.
"""

from __future__ import annotations

import time
from functools import partial

from fixtures.images import catalogue
from fixtures.images.catalogue import Built
from fixtures.sides import drop_page_cache

from .origin import NETWORKS
from .plan import Measure, Values
from .scene import Scene

PY = ("python3", "-c", 'import numpy, pandas; print("ok")')
_C = r"""printf '#include <stdio.h>\nint main(void) { puts("ok"); }\n' >/tmp/a.c"""
GCC = ("sh", "-c", f"{_C} && gcc -o /tmp/a /tmp/a.c && /tmp/a")
FORMS = ("plain", "esgz")


def start(scene: Scene, image: Built, command: tuple[str, ...]) -> Values:
    """Pull and start, cold."""
    began = scene.pull(image)
    pulled = time.monotonic()
    output = scene.start(image, command, "ok")
    sent = scene.sent()
    return {
        "pull [s]": pulled - began,
        "first output [s]": output - began,
        "requests [n]": sent.requests,
        "sent [MB]": sent.sent / 1e6,
        "sent twice [B]": sent.duplicate_bytes,
    }


def _second(scene: Scene, image: Built, command: tuple[str, ...]) -> Values:
    scene.pull(image)
    scene.start(image, command, "ok")
    warm = time.monotonic()
    warm = scene.start(image, command, "ok") - warm
    scene.settle()
    with scene.origin.cut():
        drop_page_cache()
        dropped = time.monotonic()
        dropped = scene.start(image, command, "ok") - dropped
    return {"second container [s]": warm, "page cache dropped, registry cut [s]": dropped}


def _measures(name: str, repository: str, command: tuple[str, ...]) -> list[Measure]:
    image = partial(catalogue.build, repository, FORMS)
    return [
        Measure(
            f"start-{name}",
            f"{name}: cold start",
            image,
            partial(start, command=command),
            tuple(NETWORKS),
        ),
        Measure(
            f"second-{name}", f"{name}: second container", image, partial(_second, command=command)
        ),
    ]


MEASURES = [*_measures("py", "py-full", PY), *_measures("gcc", "gcc", GCC)]
