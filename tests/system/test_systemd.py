# SPDX-License-Identifier: Apache-2.0
"""lazysnap as a service of a real systemd: nothing that is done to the service breaks a container.

Each test reads, in a container that runs all the time, a file that nobody has read before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import images, layers
from tests.support.registry import DockerRegistry, docker_registry
from tests.support.stack import wait_until
from tests.systemd.machine import Machine, machine

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
# What the daemon unpacks takes more rights than what it serves.
_CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep
_SPECIAL = [
    layers.directory("special", uid=1000, gid=1001, mode=0o1777),
    layers.file("special/setuid", b"x", uid=1000, mode=0o6755),
    layers.file("special/capable", b"x", xattrs={"security.capability": _CAPABILITY}),
    layers.Entry("special/null", "char", device=(1, 3), mode=0o666),
]
# Not those that are about the machine that the test runs on.
_PROBES = {"daemon", "database", "layers", "mount-namespace", "mounts", "shard-mounts", "shards"}
_FILES = 150
_CONTAINER = "survivor"
# Reads without end; what it reads has to be asked for again and again, and is right.
_READ_ON = "while sleep 0.1; do sha256sum -c /known/sum >/dev/null || exit 1; done"


class Scene:
    """A machine with a container of a lazy image, and the files that are still to be read."""

    def __init__(self, it: Machine, reference: str, files: dict[str, str]) -> None:
        self.machine = it
        self.reference = reference
        self._files = iter(random.Random(3).sample(list(files.items()), len(files)))
        self._reads = itertools.count()

    def start_container(self) -> None:
        self.machine.ctr(
            # No share of the CPU: that takes a controller, which the host may have in use.
            *("run", "--detach", "--snapshotter", "lazysnap", "--cpu-shares", "0"),
            *(self.reference, _CONTAINER, "sh", "-c", _READ_ON),
        )
        # From now on containerd starts it again; it would race with `ctr run`.
        self.restart_always("running")

    def restart_always(self, status: str) -> None:
        label = f"containerd.io/restart.status={status}"
        self.machine.ctr("containers", "label", _CONTAINER, label)

    def task(self) -> tuple[str, str]:
        """Process id and state of the container."""
        lines = self.machine.ctr("tasks", "ls").splitlines()[1:]
        (task,) = [words for words in map(str.split, lines) if words[0] == _CONTAINER]
        return task[1], task[2]

    def running(self) -> bool:
        lines = self.machine.ctr("tasks", "ls").splitlines()
        return any(line.split()[0] == _CONTAINER and "RUNNING" in line for line in lines[1:])

    def _cached(self, digest: str) -> bool:
        return any(digest in path.name for path in self.machine.state.glob("cache/*/*/*"))

    def read_on(self) -> None:
        """Have the container read what has to be fetched."""
        # What is beside something that was read may have come along with it.
        path, digest = next(file for file in self._files if not self._cached(file[1]))
        # By its exit status, as `ctr tasks exec` can lose the output of a process that ends soon.
        self.machine.ctr(
            *("tasks", "exec", "--exec-id", f"read{next(self._reads)}", _CONTAINER),
            *("sh", "-c", f"echo '{digest}  {path}' | sha256sum -c"),
        )


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A short path, as sockets are below it."""
    if not shutil.which("systemd-nspawn"):
        pytest.skip("needs systemd-nspawn (systemd-container)")
    made = Path(tempfile.mkdtemp(prefix="lazysnap-systemd-"))
    yield made
    shutil.rmtree(made)


def _image(directory: Path, registry: DockerRegistry) -> tuple[str, dict[str, str]]:
    """Push a lazy image; its reference, and the digest of each file that nobody reads at first."""
    rng = random.Random(11)  # data, not a secret
    known = rng.randbytes(100_000)
    entries = [layers.directory("known"), layers.file("known/data", known)]
    sums = f"{hashlib.sha256(known).hexdigest()}  /known/data\n"
    entries.append(layers.file("known/sum", sums.encode()))
    files = {}
    for number in range(_FILES):
        data = rng.randbytes(90_000)
        # Each in a directory of its own, so that nobody guesses that they are read one by one.
        entries += [layers.directory(f"d{number}"), layers.file(f"d{number}/f", data)]
        files[f"/d{number}/f"] = hashlib.sha256(data).hexdigest()
    # The end of a layer comes along with its table of contents.
    entries.append(layers.file("end", rng.randbytes(2_000_000)))
    made = [layers.estargz(images.busybox_tars()[0]), layers.estargz(entries)]
    made.append(layers.plain(_SPECIAL))
    converted = [images.Layer(m.blob, m.diff_id, m.media_type, m.annotations) for m in made]
    layout = images.write_layout(directory / "layout", converted)
    return images.push(layout, registry.host, "lazy"), files


@pytest.fixture(scope="module")
def booted(directory: Path) -> Iterator[Scene]:
    with docker_registry(directory) as registry:
        reference, files = _image(directory, registry)
        (directory / "m").mkdir()
        with machine(directory / "m", CONFIG) as it:
            it.lazysnap("pull", reference, "--plain-http")
            scene = Scene(it, reference, files)
            scene.start_container()
            yield scene


@pytest.fixture(autouse=True)
def journal(booted: Scene) -> Iterator[None]:
    """Shows the end of the journal when a test fails."""
    yield
    print(booted.machine.run("journalctl", "--no-pager", "--lines=100", check=False))


@pytest.fixture
def scene(booted: Scene) -> Iterator[Scene]:
    """The scene; after the test the container must still be the same, on the same shards."""
    it = booted.machine
    before, keepers = booted.task(), it.shards.keepers()
    assert before[1] == "RUNNING"
    yield booted
    wait_until(lambda: it.active("lazysnap"))
    booted.read_on()
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
    assert os.getxattr(special / "capable", "security.capability") == _CAPABILITY


def test_check_finds_nothing_wrong(scene: Scene) -> None:
    it = scene.machine
    found = json.loads(it.run("/opt/lazysnap/bin/lazysnap", "check", "--json", check=False))
    ours = [one for one in found if one["id"] in _PROBES]
    assert {one["id"] for one in ours} == _PROBES
    assert [one for one in ours if one["level"] in ("warning", "failure")] == []


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


def test_it_can_be_removed(booted: Scene) -> None:
    """As the README says."""
    it = booted.machine
    booted.restart_always("stopped")
    wait_until(lambda: not booted.running())
    it.ctr("tasks", "delete", "--force", _CONTAINER, check=False)
    it.ctr("containers", "delete", _CONTAINER)
    it.ctr("images", "rm", "--sync", booted.reference)
    it.run("systemctl", "disable", "--now", "lazysnap")
    it.serve_once("--unmount-on-exit")
    assert it.processes("lazysnap.shard") == []
    mounts = [line.split()[1] for line in it.run("cat", "/proc/mounts").splitlines()]
    assert [path for path in mounts if path.startswith("/var/lib/lazysnap/")] == []
    left = ("list-units", "--all", "--plain", "--no-legend", "lazysnap-shard-*")
    wait_until(lambda: it.run("systemctl", *left) == "")
