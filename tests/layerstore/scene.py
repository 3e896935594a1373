# SPDX-License-Identifier: Apache-2.0
"""`lazysnap store` with a registry whose bytes are counted, and podman.

with scene(tmp_path) as it:
    reference = it.push("app", ["estargz"] * 3, payload)
    it.podman.run("pull", reference)
    it.podman.container(reference, "cat", "/data/hello")
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fixtures.processes import kill_leftovers, unmount_below
from fixtures.proxy import Counter, counting_proxy
from tests.standalone.scene import layout
from tests.support import images
from tests.support.docker_registry import DockerRegistry, docker_registry
from tests.support.podman import Podman
from tests.support.stack import ask, wait_until

CONFIG = "[fetch]\nbackground = false\nfind_profiles = false\n"
_SECONDS = 120


class Store:
    """`lazysnap store` under a directory.

    Attributes:
        root: of it.
        path: for clients.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory / "r"
        self.path = self.root / "store"
        self._log = directory / "store.log"
        self._config = directory / "config.toml"
        self._config.write_text(CONFIG)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "lazysnap", "store", "--log-level=debug", *options]
        command += ["--root", str(self.root), "--config", str(self._config)]
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._process = process
        wait_until(lambda: process.poll() is not None or self._answers(), _SECONDS)
        assert process.poll() is None, self.log()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, EOFError):
            return self.path.is_symlink() and "ok" in self._ask("store.sock", "collect")
        return False

    def stop(self, number: signal.Signals = signal.SIGTERM, *, unmount: bool = False) -> None:
        """End the daemon; what it serves stays, unless `unmount` is given."""
        if unmount:
            self.stop()
            self.start("--unmount-on-exit")
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_SECONDS)
            self._process = None

    def reload(self, text: str) -> None:
        """Change the configuration file and tell the daemon.

        Args:
            text: of the file.
        """
        self._config.write_text(text)
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def log(self) -> str:
        """What was logged so far."""
        return self._log.read_text() if self._log.exists() else ""

    def _ask(self, name: str, call: str) -> dict[str, Any]:
        return ask(self.root / name, {"call": call, "args": {}})

    def who(self) -> dict[str, Any]:
        """The process that serves the mount, and its keeper."""
        answers: list[dict[str, Any]] = []

        def answered() -> bool:
            with contextlib.suppress(OSError, EOFError):
                answers.append(self._ask("shards/0.sock", "ping")["ok"])
            return bool(answers)

        wait_until(answered)
        return answers[0]

    def layers(self) -> int:
        """How many layers it has."""
        return len(list((self.root / "names").glob("*"))) if (self.root / "names").exists() else 0

    def is_empty(self) -> bool:
        """Collect; whether nothing is left of any layer."""
        self._ask("store.sock", "collect")
        left = [*(self.root / "names").glob("*"), *(self.root / "slots").glob("*")]
        return not left and not any((self.root / "snapshots").iterdir())


class Scene:
    """What `scene` yields; see the module."""

    def __init__(
        self, directory: Path, registry: DockerRegistry, network: Counter, client: Podman
    ) -> None:
        self.directory = directory
        self.registry = registry
        self.network = network
        self.podman = client
        self.store = Store(directory)
        self._pushed = 0

    @property
    def host(self) -> str:
        """The registry, through what counts."""
        return f"127.0.0.1:{self.network.port}"

    def push(self, name: str, forms: Sequence[str], payload: bytes = b"") -> str:
        """Push the busybox image with its three layers in these forms; its reference.

        Args:
            name: of the repository.
            forms: as for `layout`.
            payload: content of `/data/payload`.
        """
        self._pushed += 1
        made = layout(self.directory / f"layout{self._pushed}", forms, payload)
        images.push(made, self.registry.host, name)
        return f"{self.host}/{name}:latest"


@contextlib.contextmanager
def scene(directory: Path) -> Iterator[Scene]:
    """Everything, running; at the end nothing is left of it.

    Args:
        directory: with a short path.
    """
    with docker_registry(directory) as registry, counting_proxy(registry.port) as network:
        host = f"127.0.0.1:{network.port}"
        store = directory / "r" / "store"
        it = Scene(directory, registry, network, Podman(directory / "p", host, store))
        try:
            it.store.start()
            yield it
        except BaseException:
            print(it.store.log()[-8000:])
            raise
        finally:
            it.podman.close()
            it.store.stop()
            unmount_below(directory)
            kill_leftovers(directory)
