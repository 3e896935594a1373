# SPDX-License-Identifier: Apache-2.0
"""What the README says of installing and removing, followed in a Debian that has never seen lazysnap.

Needs the network: packages come from Debian and from PyPI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.registry import docker_registry
from tests.support.stack import wait_until
from tests.systemd.machine import PROJECT, Machine
from tests.systemd.scene import push_image

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd, pytest.mark.soak]

README = (PROJECT / "README.md").read_text()
_SOURCE = "/root/lazysnap"
# Those of this machine, where no package of the other one writes them anew.
_CERTIFICATES = "/root/certificates.crt"


def _blocks(heading: str) -> list[str]:
    """The blocks of code of a section."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", README, re.M | re.S)
    return re.findall(r"^```\w*\n(.*?)^```", section, re.M | re.S)


class _Newcomer(Machine):
    """A machine without lazysnap, with its source as somebody would have checked it out."""

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
        config = self.root / "etc/containerd/config.toml"
        config.write_text(config.read_text().partition("[proxy_plugins")[0])
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
        # How this machine gets at the network.
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", self.root / _CERTIFICATES.lstrip("/"))

    def _wait_for_services(self) -> None:
        wait_until(lambda: self.active("multi-user.target") and self.active("containerd.service"))

    def shell(self, script: str) -> str:
        """Run commands as root in the checkout."""
        names = ("http_proxy", "https_proxy", "PIP_INDEX_URL")
        own = [f"export {name}='{os.environ[name]}'" for name in names if name in os.environ]
        lines = [f"cd {_SOURCE}", f"export PIP_CERT={_CERTIFICATES}", *own, script]
        return self.run("sh", "-euc", "\n".join(lines))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, as sockets are below it."""
    made = Path(tempfile.mkdtemp(prefix="lazysnap-newcomer-"))
    yield made
    shutil.rmtree(made)


def test_the_readme_from_install_to_removal(directory: Path) -> None:
    with docker_registry(directory) as registry:
        reference, _ = push_image(directory, registry)
        (directory / "m").mkdir()
        it = _Newcomer(directory / "m", "")
        try:
            it.install()
            it.boot()
            before = _files(it)
            _install(it)
            _use(it, reference)
            _remove(it, reference)
            assert _files(it) <= before
        finally:
            it.end()
            subprocess.run(["umount", it.root], check=True)


def _install(it: _Newcomer) -> None:
    (install,) = _blocks("Install")
    commands, _, serve = install.strip().rpartition("\n")
    assert serve == "lazysnap serve"
    it.shell(
        "export DEBIAN_FRONTEND=noninteractive\napt-get -q update\n"
        + commands.replace("apt-get install", "apt-get install -y -q")
    )
    it.shell(_blocks("Install as a service")[0])
    it.shell(
        "sed '/^version/d; /^# Kubernetes/,$d' systemd/containerd.toml >>/etc/containerd/config.toml"
    )
    it.shell("systemctl restart containerd")
    wait_until(lambda: it.active("lazysnap") and it.active("containerd"))


def _use(it: _Newcomer, reference: str) -> None:
    (commands,) = [block for block in _blocks("containerd") if block.startswith("lazysnap pull")]
    commands = commands.replace("registry.example/app:esgz", reference)
    pull, run = commands.strip().splitlines()
    it.shell(f"export PATH=/usr/local/bin:$PATH\n{pull}")
    it.shell(run.replace("ctr run", "ctr run --cpu-shares 0") + " -c 'cat /again0/f | wc -c'")
    assert reference in it.lazysnap("status")


def _remove(it: _Newcomer, reference: str) -> None:
    """The three steps of the README."""
    (section,) = re.findall(r"^## Taking it away\n(.*?)(?=^## )", README, re.M | re.S)
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
