# SPDX-License-Identifier: Apache-2.0
"""The whole stack for system tests: a registry, containerd, and `lazysnap serve`, all private.

    with stack(tmp_path) as s:
        reference = s.push_busybox("lazy", ["estargz", "estargz", "plain"])
        result = s.pull(reference)                 # {"layers": [...], ...} as `lazysnap pull --json`
        s.run(reference, "cat", "/data/hello")     # in a container
        s.lazysnap.kill()                          # kill -9 of the daemon; shards live on
        s.lazysnap.start()

Everything is ended, unmounted and removed at the end of the block; what is left over then is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

from fixtures.processes import accepts, alive, kill_leftovers, unmount_below
from tests.support import images, layers
from tests.support.containerd import PrivateContainerd
from tests.support.docker_registry import DockerRegistry, docker_registry
from tests.support.views import make_view

SNAPSHOTTER = "lazysnap"
_START_SECONDS = 120
_STOP_SECONDS = 60


class Lazysnap:
    """`lazysnap serve` under `directory`.

    Args:
        directory: gets root, socket and log.
        config: text of the configuration file.
    """

    def __init__(self, directory: Path, config: str = "") -> None:
        self.root = directory / "r"
        self.address = directory / "l.sock"
        self.log_path = directory / "lazysnap.log"
        self._config = directory / "config.toml"
        self._config.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def configure(self, config: str) -> None:
        """Give the next start another configuration."""
        self._config.write_text(config)

    def start(self) -> None:
        """Start it and wait until its socket answers."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lazysnap", "serve", "--config", str(self._config)),
                    *("--root", str(self.root), "--address", str(self.address)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self._ended() or accepts(self.address), _START_SECONDS)
        if self._ended():
            raise RuntimeError(f"lazysnap serve did not start:\n{self.log()[-4000:]}")

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """End it with SIGTERM; mounts stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_STOP_SECONDS)
            self._process = None

    def log(self) -> str:
        """Everything that was logged so far, by the shards too."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def shards(self) -> list[int]:
        """Numbers of the shards that have a control socket."""
        found = (self.root / "shards").glob("*.sock")
        return sorted(int(path.stem) for path in found)

    def call(self, shard: int, name: str, **arguments: Any) -> Any:
        """Call a worker's control socket; waits for one that is just being replaced."""
        return _answer(self.root / "shards" / f"{shard}.sock", name, arguments)

    def workers(self) -> dict[int, int]:
        """The process id of each shard's worker."""
        return {shard: self.call(shard, "ping")["pid"] for shard in self.shards()}

    def keepers(self) -> dict[int, int]:
        """The process id of each shard's keeper."""
        return {shard: self.call(shard, "ping")["keeper"] for shard in self.shards()}

    def kill_shards(self) -> None:
        """End all keepers and workers as a power cut would; their mounts are dead afterwards."""
        pids = [*self.keepers().values(), *self.workers().values()]
        assert 1 not in pids, "a worker has lost its keeper, and init is not to be killed"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in pids))


def _answer(path: Path, name: str, arguments: dict[str, Any]) -> Any:
    """Call a socket of ours until somebody answers."""
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        with contextlib.suppress(FileNotFoundError, ConnectionError, EOFError):
            answers.append(ask(path, {"call": name, "args": arguments}))
        return bool(answers)

    wait_until(answered)
    (answer,) = answers
    if "error" in answer:
        raise RuntimeError(str(answer["error"]))
    return answer["ok"]


def ask(path: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Call a worker once; one that is just being killed may hang up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        body = msgpack.packb(question)
        connection.sendall(len(body).to_bytes(4, "big") + body)
        with connection.makefile("rb") as stream:
            head = stream.read(4)
            data = stream.read(int.from_bytes(head, "big"))
    if len(head) < 4 or len(data) < int.from_bytes(head, "big"):
        raise EOFError
    answer: dict[str, Any] = msgpack.unpackb(data, strict_map_key=False)
    return answer


class Stack:
    """What `stack` yields; see the module."""

    def __init__(
        self,
        directory: Path,
        registry: DockerRegistry,
        lazysnap: Lazysnap,
        collects_always: bool = False,
    ) -> None:
        self.directory = directory
        self.registry = registry
        self.lazysnap = lazysnap
        self.containerd = PrivateContainerd(
            directory,
            proxies={SNAPSHOTTER: str(lazysnap.address)},
            collects_always=collects_always,
        )
        self._pushed = 0

    def push_busybox(self, repository: str, forms: Sequence[str], payload: bytes = b"") -> str:
        """Push the three layers of the busybox image, each in the form that is named.

        Args:
            repository: in the registry.
            forms: `estargz`, `zstd` (zstd:chunked), `zstd-containers` or `plain`, bottom first.
            payload: content of `/data/payload`.

        Returns:
            The reference.
        """
        makers: dict[str, Callable[[bytes], layers.Layer]] = {
            "estargz": layers.estargz,
            "zstd": layers.zstd_chunked,
            "zstd-containers": lambda tar: layers.zstd_chunked(tar, dialect="containers"),
            "plain": layers.plain,
        }
        tars = images.busybox_tars(payload)
        return self.push(
            repository, [makers[form](tar) for form, tar in zip(forms, tars, strict=True)]
        )

    def push(self, repository: str, made: Sequence[layers.Layer]) -> str:
        """Push an image of these layers.

        Returns:
            The reference.
        """
        self._pushed += 1
        converted = [
            images.Layer(layer.blob, layer.diff_id, layer.media_type, layer.annotations)
            for layer in made
        ]
        layout = images.write_layout(self.directory / f"layout{self._pushed}", converted)
        return images.push(layout, self.registry.host, repository)

    def pull(
        self, reference: str, *, snapshotter: str = SNAPSHOTTER, delegated: bool = False
    ) -> dict[str, Any]:
        """`lazysnap pull --json`, which can ask the daemon to do it."""
        command = [
            *(sys.executable, "-m", "lazysnap", "pull", reference, "--plain-http", "--json"),
            *("--address", self.containerd.address, "--snapshotter", snapshotter),
            *("--root", str(self.lazysnap.root if delegated else self.directory / "none")),
            *("--namespace", self.containerd.namespace),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"lazysnap pull: {done.stderr}\n{self.lazysnap.log()[-6000:]}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def run(self, reference: str, *command: str, snapshotter: str = SNAPSHOTTER) -> str:
        """Run a container to its end; its output."""
        return self.containerd.run(reference, *command, snapshotter=snapshotter)

    def start_daemon(self) -> None:
        """Start the daemon again and wait until containerd, which retries seldom, has noticed."""
        self.lazysnap.start()
        snapshots = self.containerd.command("snapshots", "--snapshotter", SNAPSHOTTER)
        key = f"probe-{os.urandom(4).hex()}"

        def answers() -> bool:
            prepare = [*snapshots, "prepare", key]
            return subprocess.run(prepare, capture_output=True, check=False).returncode == 0

        wait_until(answers)
        subprocess.run([*snapshots, "rm", key], check=True, capture_output=True)

    def labels(self) -> dict[str, dict[str, str]]:
        """Labels of all snapshots of lazysnap, by containerd's key."""
        infos = {
            key: self.containerd.snapshot_info(key, SNAPSHOTTER)
            for key in self.containerd.snapshots(SNAPSHOTTER)
        }
        return {key: info.get("Labels") or {} for key, info in infos.items()}

    def mount(self, key: str, target: Path, parent: str) -> None:
        """Make a view of a committed snapshot and mount it."""
        target.mkdir()
        make_view(self.containerd.address, SNAPSHOTTER, key, parent)
        snapshots = ("snapshots", "--snapshotter", SNAPSHOTTER)
        output = self.containerd.ctr(*snapshots, "mounts", str(target), key)
        subprocess.run(["sh", "-ec", output], check=True)


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Poll until a condition of another process holds.

    Raises:
        TimeoutError: it did not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.01)


@contextlib.contextmanager
def stack(directory: Path, *, config: str = "", collects_always: bool = False) -> Iterator[Stack]:
    """Everything, running.

    Args:
        directory: an empty directory with a short path.
        config: text of lazysnap's configuration file.
        collects_always: containerd collects garbage all the time.
    """
    lazysnap = Lazysnap(directory, config)
    with docker_registry(directory) as registry:
        it = Stack(directory, registry, lazysnap, collects_always)
        try:
            lazysnap.start()
            it.containerd.start()
            yield it
        except BaseException:
            print(lazysnap.log()[-8000:])
            raise
        finally:
            it.containerd.stop()
            lazysnap.stop()
            unmount_below(directory)
            kill_leftovers(directory)
