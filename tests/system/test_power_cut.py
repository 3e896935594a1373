# SPDX-License-Identifier: Apache-2.0
"""What a power cut leaves: the cache's file system as its disk had it at a random moment.

The disk is a file. The file system that *this* file is on is frozen for the time of a copy, so that no
write reaches the disk meanwhile: the copy is the state of one moment, with whatever the kernel had not
written yet missing, and a sync, a commit of the journal or a write-back half done.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.filesystems import make_image, mounted

pytestmark = pytest.mark.root
MIB = 1 << 20
_CUTS = 10
_BETWEEN_CUTS = 24  # contents
_KINDS = [kind for kind in ("ext4", "xfs") if shutil.which(f"mkfs.{kind}")]


class _Storing:
    """The process that stores, and what it had said when it was last listened to.

    Nobody listens in the background: what is heard in a frozen moment must be all that was said.
    """

    def __init__(self, cache: Path, seed: int) -> None:
        self.sealed: set[int] = set()
        self.last = 0
        self._begun = b""
        command = [sys.executable, "-m", "tests.system.power_cut", "store", str(cache), str(seed)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self._output = self.process.stdout
        os.set_blocking(self._output.fileno(), False)

    def listen(self) -> None:
        while True:
            try:
                heard = os.read(self._output.fileno(), 1 << 16)
            except BlockingIOError:
                return
            assert heard, "it has ended"
            *lines, self._begun = (self._begun + heard).split(b"\n")
            for line in lines:
                word, *numbers = line.split()
                if word == b"sealed":
                    self.sealed.update(map(int, numbers))
                    self.last = max(self.last, *self.sealed)
                else:
                    self.sealed.clear()

    def wait_for(self, number: int) -> None:
        """Listen until a content with this number or a later one is sealed."""
        while self.last < number:
            time.sleep(0.05)
            self.listen()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()


@contextmanager
def _frozen(mountpoint: Path) -> Iterator[None]:
    subprocess.run(["fsfreeze", "--freeze", mountpoint], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", mountpoint], check=True)


def _recover(kind: str, image: Path) -> None:
    if kind == "ext4":
        done = subprocess.run(["e2fsck", "-p", image], capture_output=True, check=False)
        if done.returncode > 1:  # more than a replay of the journal
            done = subprocess.run(["e2fsck", "-y", image], capture_output=True, check=False)
        assert done.returncode in (0, 1), done.stdout


def _look(
    image: Path, mountpoint: Path, seed: int, known: tuple[int, list[int]]
) -> dict[str, object]:
    with mounted(image, mountpoint):
        command = [sys.executable, "-m", "tests.system.power_cut", "look"]
        done = subprocess.run(
            [*command, str(mountpoint / "cache"), str(seed)],
            input=json.dumps(known),
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", _KINDS)
def test_after_a_power_cut_all_that_opens_is_right(kind: str, tmp_path: Path) -> None:
    seed = 5
    moments = random.Random(seed)  # not a secret
    opened = chunks = 0
    # In memory: syncs are quick there, and nobody else's writes are waited for.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        outer = Path(memory, "outer")
        make_image(outer, "ext4", 700 * MIB, "-O", "^has_journal")
        with mounted(outer, tmp_path / "outer"):
            disk = tmp_path / "outer" / "disk"
            make_image(disk, kind, 320 * MIB if kind == "xfs" else 64 * MIB)
            with mounted(disk, tmp_path / "inner"):
                storing = _Storing(tmp_path / "inner" / "cache", seed)
                try:
                    for number in range(_CUTS):
                        storing.wait_for(_BETWEEN_CUTS * (number + 1))  # however slow the machine
                        time.sleep(moments.uniform(0.05, 0.6))  # a random moment is the point
                        storing.listen()
                        last, sealed = storing.last, set(storing.sealed)
                        with _frozen(tmp_path / "outer"):
                            # What is evicted between the two lines above is not to be missed.
                            storing.listen()
                            known = last, sorted(storing.sealed & sealed)
                            copy = Path(memory, f"cut{number}")
                            subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
                        _recover(kind, copy)
                        found = _look(copy, tmp_path / f"cut{number}", seed, known)
                        assert found["wrong"] == []
                        assert found["lost"] == []
                        opened += int(str(found["opened"]))
                        chunks += int(str(found["chunks"]))
                        copy.unlink()
                finally:
                    storing.end()
    # Seals and partial files do survive, else nothing was tested.
    assert opened > 20 * _CUTS
    assert chunks > 0
