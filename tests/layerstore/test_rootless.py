# SPDX-License-Identifier: Apache-2.0
"""Rootless Podman, with a store of the same user in Podman's namespaces."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from tests.standalone.ordinary import OrdinaryScene, ordinary_scene
from tests.standalone.scene import SECONDS, layout
from tests.support import images
from tests.support.docker_registry import docker_registry
from tests.support.stack import ask, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.podman]

_PAYLOAD = os.urandom(3 << 20)
_ENGINE = ("--cgroup-manager=cgroupfs", "--events-backend=file", "--runtime=runc")
_LIMITS = ("--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=64:64")


def _configure(it: OrdinaryScene, host: str) -> None:
    """Podman's settings of the user; those of storage come when the store has run."""
    home = it.directory / "home"
    it.call("mkdir", "-p", "-m", "700", home / "run", home / ".config/containers")
    it.before = [*it.before, f"XDG_RUNTIME_DIR={home}/run"]
    settings = home / ".config/containers"
    (settings / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    (settings / "registries.conf").write_text(
        f'[[registry]]\nlocation = "{host}"\ninsecure = true\n'
    )
    (settings / "storage.conf").write_text('[storage]\ndriver = "overlay"\n')


def test_a_rootless_container_fetches_what_it_reads() -> None:
    with ordinary_scene("fusermount") as it, docker_registry(it.directory) as registry:
        _configure(it, registry.host)
        made = layout(it.directory / "layout", ["estargz", "zstd", "estargz"], _PAYLOAD)
        images.push(made, registry.host, "app")
        reference = f"{registry.host}/app:latest"
        root = it.directory / "home/s"
        command = [*it.before, "podman", "unshare", sys.executable, "-m", "lazysnap", "store"]
        with (it.directory / "store.log").open("wb") as log:
            store = subprocess.Popen([*command, f"--root={root}"], stdout=log, stderr=log)

        def collect() -> bool:
            try:
                return "ok" in ask(root / "store.sock", {"call": "collect", "args": {}})
            except (OSError, EOFError):
                return False

        def is_empty() -> bool:
            return collect() and not list((root / "names").iterdir())

        try:
            wait_until(lambda: store.poll() is not None or collect(), SECONDS)
            assert store.poll() is None, (it.directory / "store.log").read_text()
            with (it.directory / "home/.config/containers/storage.conf").open("a") as file:
                file.write(f'[storage.options]\nadditionallayerstores = ["{root}/store:ref"]\n')
            it.call("podman", *_ENGINE, "pull", "--quiet", reference)
            assert len(list((root / "names").iterdir())) == 3
            script = (
                "sha256sum /data/payload; echo new >/data/hello; cat /data/hello; stat -c %u /bin"
            )
            run = ("podman", *_ENGINE, "run", "--rm", *_LIMITS, reference, "sh", "-c", script)
            said = it.call(*run).decode().split()
            assert said == [hashlib.sha256(_PAYLOAD).hexdigest(), "/data/payload", "new", "0"]
            it.call("podman", *_ENGINE, "rmi", "--force", reference)
            wait_until(is_empty)
        finally:
            it.call("podman", "system", "migrate")  # ends the process that keeps the namespaces
            store.terminate()
            store.wait(SECONDS)
