# SPDX-License-Identifier: Apache-2.0
"""Where scenes lie on the disk: each far from those of the last minute.

An ext4 without a journal, which virtual machines often have, takes no inode that was deleted within a
minute, and looks at each of these before it finds another: a scene that makes thousands of files needs
seconds of CPU for that after one that had as many nearby. So scenes use a few directories in turn, spread
over the disk by the ``T`` attribute. These stay when a run ends, for the next one: when something was
last removed from each of them says its modification time.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from fixtures.processes import kill_leftovers, unmount_below

SCENE = "s"
"""The directory of a scene within the one that it uses. Short, as there are sockets in it."""
_SLOTS = 16
"""How many are enough: so many scenes take more than a minute."""
_CANDIDATES = 100
_APART = 1 << 18
"""Between inode numbers: below a directory, ext4 stays within 16 groups of 8,192, or takes the next 16."""


def rested(place: Path) -> Path:
    """The directory in which nothing was done for the longest time, for a scene.

    Args:
        place: Has them all; made if it is not there. Scenes that killed runs left there are removed.
    """
    if not place.exists():
        _make(place)
    slots = [path for path in place.iterdir() if path.is_dir()]
    for slot in slots:
        if (slot / SCENE).exists():
            clear(slot / SCENE)
    return min(slots, key=lambda slot: slot.stat().st_mtime_ns)


def clear(scene: Path) -> None:
    """Remove a scene, with all processes and mounts in it."""
    kill_leftovers(scene)
    unmount_below(scene)
    shutil.rmtree(scene)


def _make(place: Path) -> None:
    place.mkdir(parents=True)
    # Other file systems refuse it: there, a single one may be left, or any.
    subprocess.run(["chattr", "+T", place], capture_output=True, check=False)
    candidates = [place / str(number) for number in range(_CANDIDATES)]
    for candidate in candidates:
        candidate.mkdir()
    taken: list[int] = []
    for candidate in candidates:
        number = candidate.stat().st_ino
        if len(taken) < _SLOTS and all(abs(number - other) > _APART for other in taken):
            taken.append(number)
        else:
            candidate.rmdir()
