# SPDX-License-Identifier: Apache-2.0
"""Memory of a snapshotter, all its processes together: at rest, with layers, and at its worst.

PSS counts a page that several processes share in parts. Page cache is nobody's. overlayfs lives in
the kernel and has none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from fixtures.images import big, catalogue
from fixtures.images.catalogue import Built
from tests.support import odd_images

from .plan import Measure, Values
from .reading import read, seconds
from .scene import Scene
from .start import PY

_PAUSE = 0.1


def _rest(scene: Scene, image: Built) -> Values:
    empty = scene.memory()
    scene.pull(image)
    scene.settle()  # trees and indexes may still be made
    pulled = scene.memory()
    scene.start(image, PY, "ok")
    return {
        "no layers [MB]": empty,
        "py pulled, at rest [MB]": pulled,
        "py has started [MB]": scene.memory(),
    }


def _files(scene: Scene, image: Built) -> Values:
    """How much more 100,000 files are, once the parts that any layer needs are loaded."""
    empty = scene.memory()
    with _peak(scene) as peaks:
        scene.pull(image)
    pulled = scene.memory()
    with scene.mounted(image) as root:
        entries = read("walk", root)["entries"]
        walked = scene.memory()
    each = 100_000 / entries
    return {
        "pulled, growth for 100,000 files [MB]": (pulled - empty) * each,
        "peak of the pull [MB]": max(peaks),
        "walked, growth for 100,000 files [MB]": (walked - empty) * each,
    }


def _readers(scene: Scene, image: Built) -> Values:
    scene.pull(image)
    before = scene.memory()
    with scene.mounted(image) as root, _peak(scene) as peaks:
        seconds("parts", root / big.BLOB, 4)
        seconds("tree", root, 4)
    return {"before [MB]": before, "peak [MB]": max(peaks), "after [MB]": scene.memory()}


def _four(scene: Scene, image: Built) -> Values:
    with _peak(scene) as peaks:
        scene.pull(image)
        with scene.mounted(image) as root:
            seconds("tree", root, 4)
    return {"peak [MB]": max(peaks), "after [MB]": scene.memory()}


@contextmanager
def _peak(scene: Scene) -> Iterator[list[float]]:
    """Measure memory again and again in the background."""
    found = [scene.memory()]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_PAUSE):
            found.append(scene.memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


_FORMS = ("plain", "esgz")
_PY = partial(catalogue.build, "py-full", _FORMS)
_measure = partial(Measure, lazy_only=True)
MEASURES = [
    _measure("memory-rest", "memory", _PY, _rest),
    _measure(
        "memory-files", "memory, 100,000 files", partial(odd_images.built, "many", _FORMS), _files
    ),
    _measure("memory-four", "memory, all of py by 4 readers", _PY, _four),
    _measure("memory-readers", "memory, 1 GiB by 4 readers", partial(big.build, _FORMS), _readers),
]
