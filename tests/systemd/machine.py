# SPDX-License-Identifier: Apache-2.0
"""A Debian with systemd, containerd and lazysnap as a service, booted by systemd-nspawn.

    with machine(tmp_path) as it:
        it.run("systemctl", "restart", "lazysnap")     # a command inside; its output
        it.ctr("images", "ls")
        it.reboot()

Its root is an overlay of cached trees, so that only the first use takes longer. The virtual environment
of this Python is there at the same path, read-only, and a copy of the package `lazysnap` that a test may
change. It shares the network, so a registry on loopback can be reached, and is called only through
nsenter. All its processes are in control groups of its own and in one process namespace, whose end
ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fixtures.images import cache
from fixtures.images.catalogue import DEFAULT_ROOT
from fixtures.images.debian import SUITE, Stage, build_stages
from fixtures.processes import accepts, alive, run, unmount_below
from tests.support.stack import Lazysnap, wait_until

PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = "systemd systemd-sysv containerd runc python3 {libfuse3} busybox-static"
# Nothing may touch the network, which is the host's, and nothing needs to run by the clock.
_SETTLE = """
systemctl mask systemd-networkd.service systemd-networkd.socket systemd-timesyncd.service \
  systemd-resolved.service systemd-network-generator.service systemd-firstboot.service \
  apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer
systemctl set-default multi-user.target
echo 5afe0000000000000000000000005afe >/etc/machine-id
"""
# As docs/install.md says, but for CRI, which would look for a network of pods.
_CONTAINERD = """\
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[debug]
  level = "warn"
[plugins."io.containerd.internal.v1.restart"]
  interval = "1s"
"""
# What systemd-nspawn exits with if the system inside reboots and nobody but us is to start it again.
_REBOOT = 133
_SHUTDOWN_SECONDS = 300
# What is in the process namespace of `unshare` ends with it, and it ends with us.
_ENDS_WITH_US = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--pid", "--mount-proc", "--fork", "--kill-child"),
)


class Machine:
    """What `machine` yields; see the module.

    Attributes:
        state: the host's path of /var/lib/lazysnap.
        shards: to ask shards, whose process ids are those inside.
        package: the host's path of the package that is imported inside.
    """

    def __init__(self, directory: Path, config: str, suite: str = SUITE) -> None:
        self.name = f"lazysnap-{secrets.token_hex(4)}"
        self.root = directory / "root"
        self.shards = Lazysnap(directory)  # only to look at: it is not this that starts it
        self.state = self.shards.root
        self.package = directory / "package"
        self._directory = directory
        self._config = config
        self._suite = suite
        self._groups: list[Path] = []
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    # -- inside -----------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside; its output.

        Raises:
            RuntimeError: it failed, unless `check` is false.
        """
        done = subprocess.run(
            ["nsenter", "--target", str(self._leader), "--all", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            timeout=300,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def ctr(self, *arguments: str, check: bool = True) -> str:
        """Run `ctr` inside."""
        return self.run("ctr", *arguments, check=check)

    def lazysnap(self, *arguments: str) -> str:
        """Run `lazysnap` inside."""
        return self.run("/opt/lazysnap/bin/lazysnap", *arguments)

    def signal(self, pid: int | str, name: str) -> None:
        """Send a signal to a process, by its number inside."""
        self.run("sh", "-c", f"kill -{name} {pid}")  # there is no /bin/kill without procps

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def active(self, unit: str) -> bool:
        """Whether a unit is active (and not just starting)."""
        return self.run("systemctl", "is-active", unit, check=False).strip() == "active"

    def journal(self) -> str:
        """Everything that was logged."""
        return self.run("journalctl", "--no-pager", check=False)

    def add(self, path: str, text: str) -> None:
        """Write a file; directories are made."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def upgrade(self, version: str) -> None:
        """Install another release in place of the one that is there: only its version differs."""
        init = self.package / "__init__.py"
        old = init.read_text()
        line = next(line for line in old.splitlines() if line.startswith("__version__"))
        init.write_text(old.replace(line, f'__version__ = "{version}"'))

    def processes(self, word: str) -> list[int]:
        """Numbers inside of the processes that have a word in their command line."""
        found = []
        for entry in self.path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if word.encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def serve_once(self, *options: str) -> None:
        """Run `lazysnap serve` by hand until it serves, and end it with Ctrl-C."""
        command = ["/opt/lazysnap/bin/lazysnap", "serve", *options]
        process = subprocess.Popen(
            ["nsenter", "--target", str(self._leader), "--all", *command],
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: accepts(self.path("/run/lazysnap/lazysnap.sock")))
            pid = json.loads((self.state / "daemon.json").read_text())["pid"]
            self.signal(pid, "INT")
            process.wait(120)
        finally:
            process.kill()
            process.wait()

    def path(self, inside: str) -> Path:
        """The host's path of a file inside, also of one in /run."""
        return Path(f"/proc/{self._leader}/root{inside}")

    # -- life -------------------------------------------------------------------------------------

    def install(self) -> None:
        """Make the root, and install lazysnap in it as docs/install.md says."""
        with cache.locked(DEFAULT_ROOT):
            (DEFAULT_ROOT / "stages").mkdir(exist_ok=True)
            trees = build_stages(DEFAULT_ROOT / "stages", _stages(self._suite), suite=self._suite)
        for name in ("root", "changes", "work", "r", "containerd"):
            (self._directory / name).mkdir()
        lower = ":".join(os.fspath(tree) for tree in reversed(trees))
        options = (
            f"lowerdir={lower},upperdir={self._directory}/changes,workdir={self._directory}/work"
        )
        run(["mount", "-t", "overlay", "overlay", "-o", options, self.root])
        shutil.copytree(
            PROJECT / "lazysnap", self.package, ignore=shutil.ignore_patterns("__pycache__")
        )
        (self.root / "opt/lazysnap").symlink_to(sys.prefix)
        units = self.root / "etc/systemd/system"
        for name in ("lazysnap.service", "system-lazysnap.slice"):
            shutil.copy(PROJECT / "systemd" / name, units)
        for name in ("lazysnap-shard-.scope.d", "containerd.service.d"):
            shutil.copytree(PROJECT / "systemd" / name, units / name)
        (units / "multi-user.target.wants/lazysnap.service").symlink_to("../lazysnap.service")
        self.add("/etc/lazysnap/config.toml", self._config)
        snippet = (PROJECT / "systemd/containerd.toml").read_text()
        plugin = snippet[snippet.index("[proxy_plugins") : snippet.index("# Kubernetes")]
        self.add("/etc/containerd/config.toml", _CONTAINERD + plugin)

    def boot(self) -> None:
        """Boot, and wait until the services are up."""
        self._groups = _own_groups(self.name)
        enter = "".join(f"echo $$ >{group}/cgroup.procs && " for group in self._groups)
        with (self._directory / "console").open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["sh", "-c", enter + 'exec "$@"', "sh", *_ENDS_WITH_US, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                # The control groups of today's systems, whatever those of the host are.
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                start_new_session=True,
            )
        self._wait_for_leader()
        self._wait_for_services()

    def reboot(self) -> None:
        """Reboot in good order, and wait until the services are up again."""
        assert self._nspawn is not None
        self.run("systemctl", "reboot", check=False)
        if (status := self._nspawn.wait(_SHUTDOWN_SECONDS)) != _REBOOT:
            raise RuntimeError(f"systemd-nspawn ended with {status}:\n{self.console()[-3000:]}")
        self.end()
        self.boot()

    def power_cut(self) -> None:
        """End all processes at once, as far as possible, and boot again."""
        self.end()
        self.boot()

    def end(self) -> None:
        """End all processes, and wait until they have."""
        nspawn = self._nspawn
        if nspawn is None:
            return
        if self._leader and alive(self._leader) and nspawn.poll() is None:
            os.kill(self._leader, signal.SIGKILL)  # the first of a process namespace: all go
        with contextlib.suppress(subprocess.TimeoutExpired):
            nspawn.wait(60)
        if nspawn.poll() is None:
            nspawn.kill()
            nspawn.wait(60)
        self._nspawn, self._leader = None, 0
        for group in self._groups:
            wait_until(lambda group=group: _remove_group(group))  # type: ignore[misc]
        with contextlib.suppress(OSError):
            Path("/run/systemd/nspawn/propagate", self.name).rmdir()

    def _command(self) -> Sequence[str]:
        return [
            *("systemd-nspawn", "--boot", "--quiet", "--directory", str(self.root)),
            *("--machine", self.name, "--register=no", "--keep-unit", "--console=pipe"),
            *("--private-users=no", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
            "--capability=CAP_NET_ADMIN",  # runc sets up the loopback of a container
            "--system-call-filter=@keyring bpf",  # and gives it a keyring, and rules for devices
            "--bind=/dev/fuse",
            f"--bind={self.state}:/var/lib/lazysnap:norbind",
            f"--bind={self._directory}/containerd:/var/lib/containerd:norbind",
            f"--bind-ro={sys.prefix}:{sys.prefix}:norbind",
            f"--bind={self.package}:{PROJECT}/lazysnap:norbind",
        ]

    def _wait_for_leader(self) -> None:
        """Find the first process inside, which is number 1 there."""
        nspawn = self._nspawn
        assert nspawn is not None

        def found() -> bool:
            if nspawn.poll() is not None:
                raise RuntimeError(f"systemd-nspawn ended:\n{self.console()[-3000:]}")
            self._leader = _first_below(nspawn.pid)
            return self._leader != 0

        wait_until(found)

    def _wait_for_services(self) -> None:
        units = ("multi-user.target", "lazysnap.service", "containerd.service")
        try:
            wait_until(lambda: all(self.active(unit) for unit in units))
        except TimeoutError:
            print(self.console()[-3000:], self.journal()[-8000:])
            raise

    def console(self) -> str:
        """What systemd-nspawn and the system wrote to the console."""
        path = self._directory / "console"
        return path.read_text(errors="replace") if path.exists() else ""


def _stages(suite: str) -> Sequence[Stage]:
    """How the root is made; the package of libfuse3 has another number in each release."""
    packages = _PACKAGES.format(libfuse3="libfuse3-3" if suite == SUITE else "'libfuse3-?'")
    return Stage("base"), Stage("systemd", f"apt_install {packages}\n{_SETTLE}")


def _first_below(ancestor: int) -> int:
    """The system that a process started: number 1 of a process namespace, or 0 if not there yet."""
    parents, systems = {}, []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, KeyError):
            lines = (entry / "status").read_text().splitlines()
            status = {name: value.split() for name, _, value in (x.partition(":") for x in lines)}
            parents[int(status["Pid"][0])] = int(status["PPid"][0])
            # It is called so when it has been executed in all of its namespaces.
            if status["NSpid"][-1] == "1" and status["Name"] == ["systemd"]:
                systems.append(int(status["Pid"][0]))
    for system in systems:
        pid = system
        while pid := parents.get(pid, 0):
            if pid == ancestor:
                return system
    return 0


def _own_groups(name: str) -> list[Path]:
    """New control groups below our own, in the hierarchies that systemd-nspawn uses."""
    ours = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        ours["cgroup2" if number == "0" else names] = path
    made = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        words = options.split(",")
        key = "cgroup2" if kind == "cgroup2" else "name=systemd"
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in words):
            group = Path(left.split()[4]) / ours.get(key, "/").lstrip("/") / name
            group.mkdir()
            made.append(group)
    return made


def _remove_group(group: Path) -> bool:
    """Kill what is in a control group and those below, and remove them; whether they are gone."""
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            for pid in Path(folder, "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return not group.exists()


@contextlib.contextmanager
def machine(directory: Path, config: str = "") -> Iterator[Machine]:
    """A machine, booted.

    Args:
        directory: an empty one.
        config: text of lazysnap's configuration file.
    """
    it = Machine(directory, config)
    try:
        it.install()
        it.boot()
        yield it
    finally:
        it.end()
        unmount_below(directory)
