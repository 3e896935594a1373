# SPDX-License-Identifier: Apache-2.0
"""What docs/install.md says of installing and removing, followed in a Debian that has never seen lazysnap.

In several releases of Debian, with another Python, systemd and containerd each; what becomes the next one
may fail here without any fault of lazysnap. Needs the network: packages come from Debian and from PyPI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fixtures.processes import unmount_below
from tests.support.docker_registry import docker_registry
from tests.support.stack import wait_until
from tests.systemd.machine import PROJECT, Machine
from tests.systemd.scene import CONTAINER, Scene, push_image

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd, pytest.mark.soak]

GUIDE = (PROJECT / "docs" / "install.md").read_text()
_SOURCE = "/root/lazysnap"
# Those of this machine, where no package of the other one writes them anew.
_CERTIFICATES = "/root/certificates.crt"
# Not those that are about the machine that the test runs on.
_PROBES = {"containerd", "containerd-cri", "containerd-plugin", "containerd-transfer"}
_PROBES |= {"daemon", "database", "layers", "mount-namespace", "mounts", "shard-mounts", "shards"}


def _blocks(heading: str) -> list[str]:
    """The blocks of code of a section."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", GUIDE, re.M | re.S)
    return re.findall(r"^```\w*\n(.*?)^```", section, re.M | re.S)


# What a node has before, without CRI, which would look for a network of pods.
_CONTAINERD = {
    2: """\
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
""",
    3: """\
version = 3
disabled_plugins = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
""",
}


@dataclass(frozen=True)
class _Release:
    """A release of Debian, and what is expected in it.

    Attributes:
        suite: its name.
        python: how the version of its Python begins.
        containerd: how that of its containerd begins.
    """

    suite: str
    python: str
    containerd: str

    @property
    def transfers(self) -> bool:
        """Whether containerd's transfer service can pull lazily."""
        return self.containerd.startswith("2.")


_RELEASES = (
    _Release("bookworm", "3.11", "1.6"),
    _Release("trixie", "3.13", "1.7"),
    # Not released yet, so versions move on.
    _Release("forky", "3.", "2."),
)


class _Newcomer(Machine):
    """A machine without lazysnap, with its source as somebody would have checked it out."""

    def __init__(self, directory: Path, release: _Release) -> None:
        super().__init__(directory, "", release.suite)
        self.release = release

    def install(self) -> None:
        super().install()
        units = self.root / "etc/systemd/system"
        for path in (
            self.root / "opt/lazysnap",
            units / "lazysnap.service",
            units / "system-lazysnap.slice",
            units / "multi-user.target.wants/lazysnap.service",
        ):
            path.unlink()
        for path in (units / "lazysnap-shard-.scope.d", units / "containerd.service.d"):
            shutil.rmtree(path)
        shutil.rmtree(self.root / "etc/lazysnap")
        self.add("/etc/containerd/config.toml", _CONTAINERD[3 if self.release.transfers else 2])
        source = self.root / _SOURCE.lstrip("/")
        source.mkdir(parents=True)
        archive = subprocess.run(
            ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True
        ).stdout
        for name in archive.decode().split("\0"):
            if name and (PROJECT / name).is_file():
                target = source / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, target)
        # As when the stages are built: lists of a release that is being made are valid for a week only.
        self.add("/etc/apt/apt.conf.d/valid", 'Acquire::Check-Valid-Until "false";\n')
        # How this machine gets at the network.
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", self.root / _CERTIFICATES.lstrip("/"))

    def _wait_for_services(self) -> None:
        wait_until(lambda: self.active("multi-user.target") and self.active("containerd.service"))

    def shell(self, script: str) -> str:
        """Run commands as root in the checkout."""
        names = ("http_proxy", "https_proxy", "PIP_INDEX_URL")
        own = [f"export {name}='{os.environ[name]}'" for name in names if name in os.environ]
        # Before and after pip 24.2.
        own += [f"export {name}={_CERTIFICATES}" for name in ("PIP_CERT", "SSL_CERT_FILE")]
        lines = [f"cd {_SOURCE}", *own, script]
        return self.run("sh", "-euc", "\n".join(lines))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, as sockets are below it."""
    made = Path(tempfile.mkdtemp(prefix="lazysnap-newcomer-"))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("release", _RELEASES, ids=lambda release: release.suite)
def test_the_guide_from_install_to_removal(directory: Path, release: _Release) -> None:
    with docker_registry(directory) as registry:
        reference, files = push_image(directory, registry)
        (directory / "m").mkdir()
        it = _Newcomer(directory / "m", release)
        try:
            it.install()
            it.boot()
            assert f"Python {release.python}" in it.run("python3", "--version")
            assert f" {release.containerd}" in it.run("containerd", "--version")
            before = _files(it)
            _install(it)
            _use(it, reference)
            _deploy(it)
            _restart(Scene(it, reference, files))
            _remove(it, reference)
            assert _files(it) <= before
        finally:
            print(it.console()[-3000:], it.journal()[-8000:])  # shown when it fails
            it.end()
            unmount_below(directory)


def _install(it: _Newcomer) -> None:
    (commands,) = _blocks("The package")
    it.shell(
        "export DEBIAN_FRONTEND=noninteractive\napt-get -q update\n"
        + commands.replace("apt-get install", "apt-get install -y -q")
    )
    it.shell(_blocks("The service")[0])
    it.shell(
        "sed '/^version/d; /^# Kubernetes/,$d' systemd/containerd.toml >>/etc/containerd/config.toml"
    )
    if it.release.transfers:
        (transfer,) = [block for block in _blocks("containerd") if "unpack_config" in block]
        config = it.root / "etc/containerd/config.toml"
        config.write_text(config.read_text() + transfer)
    it.shell("systemctl restart containerd")
    wait_until(lambda: it.active("lazysnap") and it.active("containerd"))


def _use(it: _Newcomer, reference: str) -> None:
    if it.release.transfers:
        it.ctr("images", "pull", "--plain-http", "--snapshotter", "lazysnap", reference)
        # Those of its layers that can be lazy.
        assert json.loads(it.lazysnap("status", "--json"))["totals"]["layers"] == 3
        it.ctr("images", "rm", "--sync", reference)
    (commands,) = [block for block in _blocks("containerd") if block.startswith("lazysnap pull")]
    commands = commands.replace("registry.example/app:esgz", reference)
    pull, run = commands.strip().splitlines()
    it.shell(f"export PATH=/usr/local/bin:$PATH\n{pull}")
    it.shell(run.replace("ctr run", "ctr run --cpu-shares 0") + " -c 'cat /again0/f | wc -c'")
    assert reference in it.lazysnap("status")
    found = json.loads(it.run("/opt/lazysnap/bin/lazysnap", "check", "--json", check=False))
    looked = [one for one in found if one["id"] in _PROBES]
    assert {one["id"] for one in looked} == _PROBES
    assert [one for one in looked if one["level"] in ("warning", "failure")] == []


def _deploy(it: _Newcomer) -> None:
    """What the DaemonSet of the guide does, in a container much like its pod's."""
    (script,) = re.findall(r"^ {10}args:\n {12}- \|\n((?: {14}.*\n)+)", GUIDE, re.M)
    before = it.show("lazysnap", "MainPID")
    # Its image has what this machine has.
    it.run("mkdir", "/srv/image")
    it.run("mount", "--bind", "/", "/srv/image")
    it.ctr(
        *("run", "--rm", "--cpu-shares", "0", "--with-ns", "pid:/proc/1/ns/pid"),  # hostPID
        # Of what `privileged` gives, and this machine has not all of.
        *("--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SYS_PTRACE"),
        *("--mount", "type=bind,src=/,dst=/host,options=rbind:rw"),
        *("--env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"),
        *("--rootfs", "/srv/image", "installer", "sh", "-euc", script),
    )
    wait_until(lambda: it.active("lazysnap"))
    assert it.show("lazysnap", "MainPID") not in ("0", before)
    assert (it.root / "opt/lazysnap.old").is_dir()
    it.lazysnap("status")
    it.run("umount", "/srv/image")
    it.run("rm", "-r", "/srv/image", "/opt/lazysnap.old", "/host")


def _restart(scene: Scene) -> None:
    """A container reads on while the service is restarted."""
    it = scene.machine
    scene.start_container()
    scene.read_more()
    keepers, since = it.shards.keepers(), scene.forget()
    it.run("systemctl", "restart", "lazysnap")
    scene.read_more()
    assert scene.window(since).failed == []
    assert it.shards.keepers() == keepers
    scene.restart_always("stopped")
    wait_until(lambda: not scene.running())
    it.ctr("tasks", "delete", "--force", CONTAINER, check=False)
    it.ctr("containers", "delete", CONTAINER)


def _remove(it: _Newcomer, reference: str) -> None:
    """The three steps of the guide."""
    (section,) = re.findall(r"^## Removal\n(.*?)(?=^## |\Z)", GUIDE, re.M | re.S)
    quoted = re.findall(r"`([^`]+)`", section)
    words = {text.split()[0]: text for text in quoted if text.startswith(("systemctl ", "rm "))}
    copied = [text for text in quoted if re.fullmatch(r"\S+\.(service|slice|d|conf)", text)]
    assert len(copied) == 4
    it.ctr("images", "rm", "--sync", reference)
    config = it.root / "etc/containerd/config.toml"
    config.write_text(config.read_text().partition("[proxy_plugins")[0])
    it.shell(words["systemctl"])
    (serve,) = [text for text in quoted if text.startswith("lazysnap serve ")]
    _, _, *options = serve.split()
    it.serve_once(*options)
    # The directory itself is a mount of this machine.
    it.shell(words["rm"].replace("/var/lib/lazysnap", "/var/lib/lazysnap/*"))
    assert not (it.root / "opt/lazysnap").exists()
    it.shell(f"cd /etc/systemd/system; rm -r {' '.join(copied)}; systemctl daemon-reload")
    assert it.processes("lazysnap") == []
    assert "/var/lib/lazysnap/" not in it.run("cat", "/proc/mounts")
    it.shell("systemctl restart containerd")
    assert "lazysnap" not in it.ctr("plugins", "ls")


def _files(it: _Newcomer) -> set[str]:
    """Paths in the machine that have the name of lazysnap in them, but its source."""
    found = it.run("find", "/etc", "/opt", "/run", "/usr", "/var", "-path", "*lazysnap*")
    return set(found.splitlines())
