# SPDX-License-Identifier: Apache-2.0
"""A scene must not lie where another was just removed, nor find anything of a run that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from fixtures.processes import clear
from tests.bench import slots


def test_the_one_that_was_left_first_comes_next(tmp_path: Path) -> None:
    place = tmp_path / "scenes"
    slots.rested(place)
    for name in ("a", "b", "c"):  # a file system may have given any number of them
        (place / name).mkdir(exist_ok=True)
    every = list(place.iterdir())
    for number, slot in enumerate(every):  # two may have been made within a tick of the clock
        os.utime(slot, ns=(number, number))
    used = []
    for number in range(len(every), 3 * len(every)):
        slot = slots.rested(place)
        (slot / slots.SCENE).mkdir()
        clear(slot / slots.SCENE)
        os.utime(slot, ns=(number, number))
        used.append(slot)
    assert used == 2 * every


def test_they_are_far_apart(tmp_path: Path) -> None:
    place = tmp_path / "scenes"
    slots.rested(place)
    shown = subprocess.run(["lsattr", "-d", place], capture_output=True, text=True, check=False)
    if "T" not in shown.stdout.partition(" ")[0]:
        pytest.skip("the file system does not spread directories")
    numbers = sorted(slot.stat().st_ino for slot in place.iterdir())
    assert all(after - before > 1 << 17 for before, after in pairwise(numbers))


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "scenes"
    left = slots.rested(place) / slots.SCENE
    left.mkdir()
    (left / "file").write_text("x")
    with subprocess.Popen(["tail", "-f", left / "file"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.read(1) == b"x"  # it runs, and has its command line
            slots.rested(place)
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()
    assert not left.exists()
