# SPDX-License-Identifier: Apache-2.0
"""The tree of a Debian image: its metadata, and all the files of its /usr."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fixtures.images import catalogue
from fixtures.images.catalogue import Built
from fixtures.processes import run

from .plan import Measure, Values
from .reading import seconds, thrice
from .scene import Scene


def _of_tree(scene: Scene, image: Built, take: Callable[[Path], float]) -> Values:
    scene.pull(image)
    with scene.mounted(image) as root:
        values = thrice(scene, partial(take, root))
    return {**values, "sent twice [B]": scene.sent().duplicate_bytes}


def _walk(root: Path) -> float:
    return seconds("walk", root)


def _tar(root: Path) -> float:
    began = time.monotonic()
    # Through cat: tar reads nothing when it sees that it writes to /dev/null.
    run(["bash", "-c", f"set -o pipefail; tar -C {root} -cf - usr | cat >/dev/null"], timeout=240)
    return time.monotonic() - began


def _four(root: Path) -> float:
    return seconds("tree", root / "usr", 4)


_IMAGE = partial(catalogue.build, "py-full", ("plain", "esgz"))
MEASURES = [
    Measure("walk", "py: walk of the tree with lstat", _IMAGE, partial(_of_tree, take=_walk)),
    Measure("tar", "py: tar of /usr", _IMAGE, partial(_of_tree, take=_tar)),
    Measure("four", "py: /usr read by 4 processes", _IMAGE, partial(_of_tree, take=_four)),
]
