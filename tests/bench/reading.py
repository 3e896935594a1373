# SPDX-License-Identifier: Apache-2.0
"""Helps measurements of reading: runs the reader, three times where it tells something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fixtures.processes import run
from fixtures.sides import drop_page_cache

from .plan import Values
from .scene import Scene

_READER = Path(__file__).with_name("reader.py")


def read(way: str, *arguments: object) -> dict[str, float]:
    """What ``reader.py`` prints."""
    words = [str(argument) for argument in arguments]
    result: dict[str, float] = json.loads(
        run(["/usr/bin/python3", "-I", _READER, way, *words], timeout=240)
    )
    return result


def seconds(way: str, *arguments: object) -> float:
    """How long ``reader.py`` took."""
    return read(way, *arguments)["seconds"]


def thrice(scene: Scene, measure: Callable[[], float]) -> Values:
    """Seconds at first, again, and when everything is local but the page cache is dropped.

    At first, the snapshotter may be busy with whatever it does after a pull; later it is at rest.
    """
    first = measure()
    scene.settle()
    again = measure()
    drop_page_cache()
    return {"first [s]": first, "again [s]": again, "page cache dropped [s]": measure()}
