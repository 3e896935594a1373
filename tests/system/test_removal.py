# SPDX-License-Identifier: Apache-2.0
"""Lazysnap can be taken away: what is mounted, runs or listens is gone, and then its directories."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.processes import accepts
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

SECONDS = 120


def _named(path: Path, text: str) -> bool:
    """Whether a text names a path, or one below it, and not just one that begins alike."""
    return re.search(rf"{re.escape(str(path))}(?![\w.-])", text) is not None


def _mounts(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # Also as a source or in the options, as overlay has it.
    return [line for line in lines if _named(directory, line)]


def _sockets(directory: Path) -> list[str]:
    return [
        line for line in Path("/proc/net/unix").read_text().splitlines() if str(directory) in line
    ]


def _processes(directory: Path) -> list[str]:
    """Everybody who names the directory on his command line or has something of it open."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or entry.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            links = [*(entry / "fd").iterdir(), entry / "cwd", entry / "root"]
            targets = [_link(link) for link in links]
            if any(_named(directory, each) for each in (command, *targets)):
                found.append(f"{entry.name} {command}")
    return found


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _loops(directory: Path) -> str:
    done = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if _named(directory, line))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in use"])
def test_nothing_is_left(tmp_path: Path, busy: bool) -> None:
    """Also when somebody still has a snapshot mounted, as a container that was not ended has."""
    with stack(tmp_path, config="[shards]\ncount = 2\n") as it:
        reference = it.push_busybox("leaving", ["estargz", "zstd", "plain"], payload=b"x" * 500_000)
        it.pull(reference)
        it.run(reference, "cat", "/data/payload")
        target = tmp_path / "target"
        if busy:
            (top,) = _tops(it)
            it.mount("busy", target, top)
        it.lazysnap.stop()
        _serve_and_unmount(it)
        if busy:
            subprocess.run(["umount", target], check=True)
        root = it.lazysnap.root
        wait_until(lambda: not _processes(root), SECONDS)
        assert _mounts(root) == []
        # The kernel may let go of the sockets of a process a moment after its files.
        wait_until(lambda: not _sockets(root) + _sockets(it.lazysnap.address), SECONDS)
        assert _loops(root) == ""
        shutil.rmtree(root)
        assert sorted(path.name for path in tmp_path.glob("l.sock*")) == ["l.sock.lock"]


def _tops(it: Stack) -> list[str]:
    snapshots = it.containerd.snapshots("lazysnap")
    parents = {parent for parent, _ in snapshots.values()}
    return [
        key for key, (_, kind) in snapshots.items() if kind == "Committed" and key not in parents
    ] or [next(parent for parent, kind in snapshots.values() if kind == "Active")]


def _serve_and_unmount(it: Stack) -> None:
    command = [
        *(sys.executable, "-m", "lazysnap", "serve", "--unmount-on-exit"),
        *("--config", str(it.directory / "config.toml")),
        *("--root", str(it.lazysnap.root), "--address", str(it.lazysnap.address)),
    ]
    with it.lazysnap.log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: accepts(it.lazysnap.address), SECONDS)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
