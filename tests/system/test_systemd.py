# SPDX-License-Identifier: Apache-2.0
"""lazysnap as a service of a real systemd: nothing that is done to the service breaks a container.

A container reads during all of it without a pause, files that are local and files that have to be fetched,
and compares every byte. How long the longest of its reads took is printed, and not judged.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.docker_registry import docker_registry
from tests.support.stack import wait_until
from tests.systemd.machine import Machine, machine
from tests.systemd.scene import CAPABILITY, CONTAINER, Scene, push_image

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

CONFIG = """\
[shards]
count = 2
[snapshots]
eager = "direct"
[fetch]
background = false
learn_profiles = false
find_profiles = false
"""
# Not those that are about the machine that the test runs on.
_PROBES = {"daemon", "database", "layers", "mount-namespace", "mounts", "shard-mounts", "shards"}
# What a reader may get whose mount has no process any more.
_GONE = {"ENOTCONN", "ECONNABORTED", "EIO"}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A short path, as sockets are below it."""
    if not shutil.which("systemd-nspawn"):
        pytest.skip("needs systemd-nspawn (systemd-container)")
    made = Path(tempfile.mkdtemp(prefix="lazysnap-systemd-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def booted(directory: Path) -> Iterator[Scene]:
    with docker_registry(directory) as registry:
        reference, files = push_image(directory, registry)
        (directory / "m").mkdir()
        with machine(directory / "m", CONFIG) as it:
            it.lazysnap("pull", reference, "--plain-http")
            scene = Scene(it, reference, files)
            scene.start_container()
            scene.read_more()
            yield scene


@pytest.fixture(autouse=True)
def journal(booted: Scene) -> Iterator[None]:
    """Shows the end of the journal when a test fails."""
    yield
    print(booted.machine.run("journalctl", "--no-pager", "--lines=100", check=False))


@pytest.fixture
def scene(
    booted: Scene, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Iterator[Scene]:
    """The scene. Meanwhile the container reads on, without an error, and on the same shards."""
    it = booted.machine
    before, keepers = booted.task(), it.shards.keepers()
    assert before[1] == "RUNNING"
    since = booted.forget()
    yield booted
    wait_until(lambda: it.active("lazysnap"))
    booted.read_on()
    booted.read_more()
    booted.fetch_more(since)
    window = booted.window(since)
    with capsys.disabled():
        print(f"\n{request.node.name}: {window}")
    assert window.failed == []
    assert booted.task() == before
    assert it.shards.keepers() == keepers


def _pid(it: Machine) -> str:
    return it.show("lazysnap", "MainPID")


def _wait_for_another(it: Machine, was: str) -> None:
    wait_until(lambda: it.active("lazysnap") and _pid(it) not in ("0", was))


def _restart(scene: Scene) -> None:
    scene.machine.run("systemctl", "restart", "lazysnap")


def _stop_and_start(scene: Scene) -> None:
    scene.machine.run("systemctl", "stop", "lazysnap")
    scene.read_on()
    scene.machine.run("systemctl", "start", "lazysnap")


def _crash(scene: Scene) -> None:
    pid = _pid(scene.machine)
    scene.machine.signal(pid, "KILL")
    scene.read_on()
    _wait_for_another(scene.machine, pid)


def _kill_the_unit(scene: Scene) -> None:
    """All processes of the service, as `systemctl kill` does unless told otherwise."""
    pid = _pid(scene.machine)
    scene.machine.run("systemctl", "kill", "--signal=KILL", "lazysnap")
    _wait_for_another(scene.machine, pid)


def _restart_systemd(scene: Scene) -> None:
    scene.machine.run("systemctl", "daemon-reexec")
    _restart(scene)


@pytest.mark.parametrize(
    "event", [_restart, _stop_and_start, _crash, _kill_the_unit, _restart_systemd]
)
def test_a_container_reads_on(scene: Scene, event: Callable[[Scene], None]) -> None:
    before = _pid(scene.machine)
    event(scene)
    assert _pid(scene.machine) != before


def test_the_watchdog_replaces_a_daemon_that_hangs(scene: Scene) -> None:
    it = scene.machine
    drop_in = "/etc/systemd/system/lazysnap.service.d/watchdog.conf"
    it.add(drop_in, "[Service]\nWatchdogSec=10\n")
    it.run("systemctl", "daemon-reload")
    it.run("systemctl", "restart", "lazysnap")
    pinged = it.show("lazysnap", "WatchdogTimestampMonotonic")
    wait_until(lambda: it.show("lazysnap", "WatchdogTimestampMonotonic") != pinged)
    pid = _pid(it)
    it.signal(pid, "STOP")
    scene.read_on()
    _wait_for_another(it, pid)
    assert "Watchdog timeout" in it.journal()
    assert "Fatal Python error: Aborted" in it.journal()  # and where each thread was
    (it.root / drop_in.lstrip("/")).unlink()
    it.run("systemctl", "daemon-reload")
    it.run("systemctl", "restart", "lazysnap")


def test_an_upgrade_replaces_the_workers(scene: Scene) -> None:
    it = scene.machine
    workers = it.shards.workers()
    it.upgrade("99.1")
    it.run("systemctl", "restart", "lazysnap")

    def versions() -> set[str]:
        return {it.shards.call(shard, "ping")["version"] for shard in workers}

    wait_until(lambda: versions() == {"99.1"})
    assert not set(it.shards.workers().values()) & set(workers.values())


def test_a_changed_configuration_is_taken_up_by_reload(scene: Scene) -> None:
    it = scene.machine
    pid = _pid(it)
    it.add("/etc/lazysnap/config.toml", 'log_level = "debug"\n' + CONFIG)
    it.run("systemctl", "reload", "lazysnap")
    wait_until(lambda: "configuration reloaded" in it.journal())
    assert _pid(it) == pid


def test_shards_are_apart_from_the_daemon(scene: Scene) -> None:
    it = scene.machine
    pids = [*it.shards.keepers().values(), *it.shards.workers().values()]
    for pid in pids:
        group = it.run("cat", f"/proc/{pid}/cgroup").split("0::")[1]
        assert "/system.slice/system-lazysnap.slice/lazysnap-shard-" in group
        scope = group.strip().rpartition("/")[2]
        assert it.show(scope, "DefaultDependencies") == "no"
        assert it.show(scope, "Description").startswith("Shard of lazysnap")


def test_all_see_the_same_mounts(scene: Scene) -> None:
    it = scene.machine
    processes = ["1", _pid(it), it.show("containerd", "MainPID")]
    processes += map(str, it.shards.keepers().values())
    namespaces = {it.run("readlink", f"/proc/{pid}/ns/mnt") for pid in processes}
    assert len(namespaces) == 1


def test_what_the_daemon_unpacks_is_complete(scene: Scene) -> None:
    """None of the rights that the unit takes away is needed."""
    # If it fails, containerd unpacks the layer instead.
    assert "a layer is unpacked" in scene.machine.journal()
    (special,) = scene.machine.state.glob("snapshots/*/fs/special")
    found = {}
    for path in (special, *special.iterdir()):
        status = path.lstat()
        found[path.name] = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev)
    assert found == {
        "special": ("0o41777", 1000, 1001, 0),
        "setuid": ("0o106755", 1000, 0, 0),
        "capable": ("0o100644", 0, 0, 0),
        "null": ("0o20666", 0, 0, os.makedev(1, 3)),
    }
    assert os.getxattr(special / "capable", "security.capability") == CAPABILITY


def test_check_finds_nothing_wrong(scene: Scene) -> None:
    it = scene.machine
    found = json.loads(it.run("/opt/lazysnap/bin/lazysnap", "check", "--json", check=False))
    ours = [one for one in found if one["id"] in _PROBES]
    assert {one["id"] for one in ours} == _PROBES
    assert [one for one in ours if one["level"] in ("warning", "failure")] == []


@pytest.mark.parametrize("times", [1, 5])
def test_workers_are_killed(scene: Scene, times: int) -> None:
    it = scene.machine
    for _ in range(times):
        workers = it.shards.workers()
        for pid in workers.values():
            it.signal(pid, "KILL")
        scene.read_more()
        assert not set(it.shards.workers().values()) & set(workers.values())


def test_workers_and_daemon_are_killed_at_once(scene: Scene) -> None:
    it = scene.machine
    pid = _pid(it)
    it.signal(" ".join([pid, *map(str, it.shards.workers().values())]), "KILL")
    scene.read_more()
    _wait_for_another(it, pid)


def test_keepers_are_killed(booted: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """Workers serve on without keepers. When those end, too, the mounts are gone."""
    it = booted.machine
    keepers, workers = it.shards.keepers(), it.shards.workers()
    since = booted.forget()
    it.signal(" ".join(map(str, keepers.values())), "KILL")
    wait_until(lambda: not any(it.path(f"/proc/{pid}").exists() for pid in keepers.values()))
    booted.read_on()
    booted.read_more()
    booted.fetch_more(since)
    window = booted.window(since)
    with capsys.disabled():
        print(f"\nkeepers killed: {window}")
    assert window.failed == []
    assert it.shards.workers() == workers

    since = booted.noted()
    it.signal(" ".join(map(str, workers.values())), "KILL")
    booted.read_more()
    window = booted.window(since)
    with capsys.disabled():
        print(f"\nworkers killed, too: {window}")
    assert {each.outcome for each in window.reads} <= {"right", *_GONE}
    # What was started before has the mounts that are gone; what is started now, the new ones.
    (was, _) = booted.task()
    it.ctr("tasks", "kill", "--signal", "KILL", CONTAINER)
    wait_until(lambda: booted.running() and booted.task()[0] != was)
    since = booted.noted()
    booted.read_on()
    booted.read_more()
    assert booted.window(since).failed == []
    assert not set(it.shards.keepers().values()) & set(keepers.values())


@pytest.mark.parametrize("event", ["reboot", "power cut"])
def test_the_container_comes_back_after(booted: Scene, event: str) -> None:
    it = booted.machine
    if event == "reboot":
        it.reboot()
    else:
        it.power_cut()
    ready = int(it.show("lazysnap", "ActiveEnterTimestampMonotonic"))
    assert 0 < ready <= int(it.show("containerd", "ExecMainStartTimestampMonotonic"))
    wait_until(booted.running)
    booted.read_on()
    since = booted.noted()
    booted.read_more()
    assert booted.window(since).failed == []


def test_it_can_be_removed(booted: Scene) -> None:
    """As docs/install.md says."""
    it = booted.machine
    booted.restart_always("stopped")
    wait_until(lambda: not booted.running())
    it.ctr("tasks", "delete", "--force", CONTAINER, check=False)
    it.ctr("containers", "delete", CONTAINER)
    it.ctr("images", "rm", "--sync", booted.reference)
    it.run("systemctl", "disable", "--now", "lazysnap")
    it.serve_once("--unmount-on-exit")
    assert it.processes("lazysnap.shard") == []
    mounts = [line.split()[1] for line in it.run("cat", "/proc/mounts").splitlines()]
    assert [path for path in mounts if path.startswith("/var/lib/lazysnap/")] == []
    left = ("list-units", "--all", "--plain", "--no-legend", "lazysnap-shard-*")
    wait_until(lambda: it.run("systemctl", *left) == "")
