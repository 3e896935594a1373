# SPDX-License-Identifier: Apache-2.0
"""`lazysnap serve` as a process: one for each root, in and out of life."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lazysnap
from fixtures.processes import accepts, alive, kill_leftovers, unmount_below
from lazysnap import mounts
from lazysnap.supervisor import Supervisor
from tests.support.stack import Lazysnap, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse]

CONFIG = "[shards]\ncount = 1\n"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Lazysnap]:
    it = Lazysnap(tmp_path, CONFIG)
    try:
        yield it
    finally:
        it.stop()
        unmount_below(tmp_path)
        kill_leftovers(tmp_path)


def _serve(root: Path, address: Path, config: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "lazysnap", "serve", "--config", str(config)),
        *("--root", str(root), "--address", str(address), *options),
    ]


def _mounted(path: Path) -> bool:
    return mounts.mounted_at(str(path)) is not None


def _processes(root: Path) -> list[int]:
    """Everybody who names the root on his command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                if os.fsencode(root) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.parametrize("same", ["root", "address"])
def test_a_second_daemon_is_refused(daemon: Lazysnap, tmp_path: Path, same: str) -> None:
    daemon.start()
    root = daemon.root if same == "root" else tmp_path / "r2"
    address = daemon.address if same == "address" else tmp_path / "l2.sock"
    done = subprocess.run(
        _serve(root, address, daemon._config), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    (message, hint) = done.stderr.splitlines()[-2:]
    assert message.startswith("lazysnap: ")
    assert str(root if same == "root" else address) in message
    assert hint.startswith("hint: ")
    assert _processes(tmp_path / "r2") == []
    assert daemon.call(0, "ping")["shard"] == 0


def test_it_says_who_serves_the_root(daemon: Lazysnap) -> None:
    daemon.start()
    facts = json.loads((daemon.root / "daemon.json").read_text())
    assert facts == {
        "pid": daemon.pid,
        "version": lazysnap.__version__,
        "address": str(daemon.address),
    }


def test_errors_while_starting_are_messages(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    long = tmp_path / ("l" * 100) / "l.sock"
    try:
        done = subprocess.run(
            _serve(tmp_path / "r", long, config), capture_output=True, text=True, timeout=120
        )
    finally:
        unmount_below(tmp_path)
        kill_leftovers(tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "longer than" in done.stderr


def test_it_ends_and_leaves_its_mounts(daemon: Lazysnap) -> None:
    daemon.start()
    keepers = daemon.keepers()
    daemon.stop()
    assert _mounted(daemon.root / "shards/0")
    daemon.start()
    assert daemon.keepers() == keepers


def test_unmounting_on_exit_leaves_nothing(daemon: Lazysnap, tmp_path: Path) -> None:
    command = _serve(daemon.root, daemon.address, daemon._config, "--unmount-on-exit")
    with daemon.log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_until(lambda: accepts(daemon.address))
    assert _mounted(daemon.root / "shards/0")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    assert mounts.mounted_below(str(tmp_path)) == []
    assert _processes(daemon.root) == []


def test_a_worker_without_a_keeper_ends_too(daemon: Lazysnap) -> None:
    daemon.start()
    os.kill(daemon.keepers()[0], signal.SIGKILL)
    daemon.stop()
    command = _serve(daemon.root, daemon.address, daemon._config, "--unmount-on-exit")
    with daemon.log_path.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_until(lambda: accepts(daemon.address))
    # A directory that is in use keeps the detached mount, and so its worker, alive.
    held = os.open(daemon.root / "shards/0", os.O_RDONLY)
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert _processes(daemon.root) == []
    finally:
        os.close(held)


def test_shards_of_an_earlier_configuration_are_ended(tmp_path: Path) -> None:
    many = Lazysnap(tmp_path, "[shards]\ncount = 3\n")
    try:
        many.start()
        assert len(many.keepers()) == 3
        many.stop()
        few = Lazysnap(tmp_path, CONFIG)
        few.start()
        wait_until(lambda: len(_processes(few.root / "")) <= 3)  # daemon, keeper, worker
        few.stop()
        assert _mounted(few.root / "shards/0")
        assert not _mounted(few.root / "shards/2")
    finally:
        unmount_below(tmp_path)
        kill_leftovers(tmp_path)


def test_a_dead_mount_in_the_way_is_replaced(daemon: Lazysnap) -> None:
    daemon.start()
    daemon.stop()
    daemon.kill_shards()
    assert _mounted(daemon.root / "shards/0")
    with pytest.raises(OSError, match="not connected"):
        os.listdir(daemon.root / "shards/0")
    daemon.start()
    assert os.listdir(daemon.root / "shards/0") == []
    points = [p for p in mounts.mount_points() if p.path == str(daemon.root / "shards/0")]
    assert len(points) == 1


def test_it_stops_while_it_starts(daemon: Lazysnap, tmp_path: Path) -> None:
    """Nobody answers at the shard's socket, as its lock is taken by somebody else."""
    import fcntl

    (daemon.root / "shards").mkdir(parents=True)
    with (daemon.root / "shards/0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with daemon.log_path.open("ab") as log:
            process = subprocess.Popen(
                _serve(daemon.root, daemon.address, daemon._config), stdout=log, stderr=log
            )
        wait_until(lambda: (daemon.root / "metadata.db").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert "shard does not start" not in daemon.log()  # it did not wait for that


@pytest.mark.parametrize("written", ["own", "of a stranger"])
def test_a_stranger_with_a_keepers_number_is_not_signalled(daemon: Lazysnap, written: str) -> None:
    daemon.start()
    daemon.stop()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        supervisor = Supervisor(str(daemon.root), 1)
        keeper = daemon.keepers()[0]
        pid = keeper if written == "own" else stranger.pid
        supervisor._signal(0, pid, signal.SIGTERM)
        if written == "own":
            wait_until(lambda: not _mounted(daemon.root / "shards/0"))
            wait_until(lambda: not alive(keeper))
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                stranger.wait(0.2)
    finally:
        stranger.kill()
        stranger.wait()


def _open_files(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def test_shards_hold_nothing_of_the_daemon(daemon: Lazysnap) -> None:
    daemon.start()
    for pid in (*daemon.keepers().values(), *daemon.workers().values()):
        open_files = _open_files(pid)
        assert str(daemon.root / "lock") not in open_files
        assert not any("metadata.db" in name for name in open_files)
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    keeper = daemon.keepers()[0]
    known = {"/dev/null", "/dev/fuse", str(daemon.log_path), str(daemon.root / "shards/0.lock")}
    held = _open_files(keeper)
    assert {name for name in held if not name.startswith("anon_inode")} <= known


def test_the_umask_of_the_parent_does_not_matter(daemon: Lazysnap) -> None:
    before = os.umask(0o777)
    try:
        command = _serve(daemon.root, daemon.address, daemon._config)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    finally:
        os.umask(before)
    wait_until(lambda: accepts(daemon.address))
    assert (daemon.root / "shards").stat().st_mode & 0o777 == 0o711
    assert (daemon.root / "snapshots").stat().st_mode & 0o700 == 0o700
    process.terminate()
    assert process.wait(120) == 0


def test_a_root_behind_a_link_is_the_same_root(daemon: Lazysnap, tmp_path: Path) -> None:
    link = tmp_path / "link"
    daemon.root.mkdir()
    link.symlink_to(daemon.root)
    with daemon.log_path.open("ab") as log:
        process = subprocess.Popen(
            _serve(link, daemon.address, daemon._config), stdout=log, stderr=log
        )
    wait_until(lambda: accepts(daemon.address))
    keepers = daemon.keepers()
    process.terminate()
    process.wait(120)
    daemon.start()
    assert daemon.keepers() == keepers


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_shards_live_on_when_the_daemons_output_goes_away(daemon: Lazysnap, kind: str) -> None:
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    command = _serve(daemon.root, daemon.address, daemon._config)
    process = subprocess.Popen(command, stdout=writer, stderr=writer, start_new_session=True)
    os.close(writer)
    wait_until(lambda: accepts(daemon.address))
    keepers, workers = daemon.keepers(), daemon.workers()
    process.terminate()
    process.wait(120)
    if kind == "pipe":  # nobody holds the other end, so its reader is not kept waiting
        while os.read(reader, 1 << 16):
            pass
    os.close(reader)
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: not alive(workers[0]))
    assert daemon.workers() != workers
    assert daemon.keepers() == keepers
    assert os.listdir(daemon.root / "shards/0") == []
    assert "starting another" in (daemon.root / "shards/0.log").read_text()
