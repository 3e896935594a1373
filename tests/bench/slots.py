# SPDX-License-Identifier: Apache-2.0
"""Where scenes lie on the disk: each far from those of the last minutes.

An ext4 without a journal, which virtual machines often have, takes no inode that was deleted lately (up to
six minutes, if another one in the same block is written to), and looks at each of these before it finds
another: a scene that makes thousands of files needs seconds of CPU for that after one that had as many
nearby. So scenes use some directories in turn, spread over the disk by the ``T`` attribute. These stay
when a run ends, for the next one: when something was last removed from each says its modification time.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from fixtures.processes import clear

SCENE = "s"
"""The directory of a scene within the one that it uses. Short, as there are sockets in it."""
_SLOTS = 72
"""How many are enough: the shortest scenes take five seconds."""
_CANDIDATES = 1000
_APART = 1 << 17
"""Between inode numbers: below such a directory, ext4 mostly stays within 16 groups of 8,192."""


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
