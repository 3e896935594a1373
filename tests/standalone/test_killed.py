# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of `lazysnap mount` and `umount` wherever it hits them: umount leaves a clean system."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.standalone.scene import Scene, layout

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.slow]

# More points with LAZYSNAP_EXHAUSTIVE=1: all.
_POINTS = 12


def _steps(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Where to kill a command that was run to its end once."""
    assert done.returncode == 0, done.stderr
    count = int(done.stdout.splitlines()[-1])
    assert count > 20
    if os.environ.get("LAZYSNAP_EXHAUSTIVE"):
        return list(range(1, count + 1))
    # The last ones are of the kind that others see.
    return sorted({1 + count * n // _POINTS for n in range(_POINTS)} | {count - 1, count})


@pytest.mark.parametrize("option", ["", "--writable"])
def test_mount_is_killed(it: Scene, option: str) -> None:
    payload = os.urandom(1_000_000)
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], payload)
    arguments = ("mount", f"oci:{made.path}", it.point, *option.split())
    steps = _steps(it.crash(0, *arguments))
    it.umount()
    it.assert_clean()
    killed = 0
    for step in steps:
        done = it.crash(step, *arguments)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode != 0
        it.umount()
        it.assert_clean()
    assert killed > len(steps) // 2
    it.mount(*(str(argument) for argument in arguments[1:2]))
    assert (it.point / "data/payload").read_bytes() == payload
    it.umount()
    it.assert_clean()


def test_mount_is_killed_beside_another(it: Scene) -> None:
    """What another mount shares with it stays."""
    payload = os.urandom(1_000_000)
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], payload)
    upper = layout(it.directory / "other", ["estargz", "estargz", "plain"], payload)
    point = it.new_point()
    arguments = ("mount", f"oci:{upper.path}", point)
    steps = _steps(it.crash(0, *arguments))
    it.umount(point=point)
    it.mount(f"oci:{made.path}")
    for step in steps[:: 1 if os.environ.get("LAZYSNAP_EXHAUSTIVE") else 3]:
        it.crash(step, *arguments)
        it.umount(point=point)
        assert os.listdir(point) == []
        assert (it.point / "data/hello").read_text() == "hello from the top layer\n"
        assert (it.point / "data/payload").read_bytes() == payload
    it.umount()
    it.assert_clean()


def test_umount_is_killed(it: Scene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], os.urandom(100_000))
    arguments = ("umount", it.point)
    it.mount(f"oci:{made.path}")
    steps = _steps(it.crash(0, *arguments))
    for step in steps[::2]:
        it.mount(f"oci:{made.path}")
        it.crash(step, *arguments)
        it.umount()
        it.assert_clean()
