# SPDX-License-Identifier: Apache-2.0
"""A private containerd for tests: its own root, state and socket; no CRI; ended by its pid.

Recipe, tried with containerd 1.6.20 and runc 1.1.5 of Debian 12 on cgroup v1 and v2:

    with PrivateContainerd(tmp_path) as containerd:
        containerd.ctr("images", "pull", "--plain-http", reference)      # overlayfs, unpacked
        output = containerd.run(reference, "/bin/cat", "/etc/motd")      # a container by runc

With a proxy snapshotter: `PrivateContainerd(tmp_path, proxies={"lazysnap": socket})`, then
`run(..., snapshotter="lazysnap")`. containerd starts whether or not the proxy's socket is there;
calls fail with Unavailable until it is.

Things to know: runc's state (/run/containerd/runc/<namespace>) and the shims' sockets are common to
all containerds of the machine, so container ids must be unique: `run` makes them so. A container
gets a network namespace without a network. From a trio test that also serves the registry itself,
call these blocking methods through `trio.to_thread.run_sync`. Images come from
`tests.support.images`, a registry from `tests.support.registry`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# What a test does not need; CRI alone would double the start-up time and look for CNI.
_DISABLED = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
)
# Garbage is collected when a client asks for it and waits, and hardly ever besides; or all the time.
# (containerd 1.6, docs/garbage-collection.md; thresholds of 0 would be the defaults' immediate ones.)
_WHEN_ASKED = {
    "startup_delay": "0s",
    "deletion_threshold": 1_000_000,
    "mutation_threshold": 0,
    "pause_threshold": 0.00001,
}
_ALWAYS = {
    "startup_delay": "1ms",
    "schedule_delay": "0ms",
    "mutation_threshold": 1,
    "pause_threshold": 0.5,
}
_START_SECONDS = 120
_STOP_SECONDS = 60


class PrivateContainerd:
    """containerd under `directory`, running between `start` and `stop` (or as a `with` block).

    Args:
        directory: where root, state, socket (`c.sock`), configuration and `containerd.log` go; a
            short path, since a socket's path has at most 107 bytes.
        proxies: snapshotter name to the socket of its proxy plugin.
        namespace: what `ctr` and `run` work in.
        collects_always: garbage is collected after almost each change: what is neither leased nor
            referred to is gone at once. Else only when a client asks for it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        proxies: Mapping[str, str | Path] | None = None,
        namespace: str = "default",
        collects_always: bool = False,
    ) -> None:
        self.directory = directory / "containerd"
        self.address = str(self.directory / "c.sock")
        self.log_path = self.directory / "containerd.log"
        self.namespace = namespace
        self.proxies = dict(proxies or {})
        self._collection = _ALWAYS if collects_always else _WHEN_ASKED
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        if len(self.address.encode()) > 100:
            raise ValueError(f"path too long for a socket: {self.address}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it has booted; may be called again after `stop` or `kill`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.toml"
        config.write_text(self._config())
        self._process = subprocess.Popen(
            ["containerd", "--config", str(config), "--log-level", "debug"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        booted = threading.Event()
        self._reader = threading.Thread(
            target=self._copy_log, args=(self._process, booted), daemon=True
        )
        self._reader.start()
        if not booted.wait(_START_SECONDS) or self._process.poll() is not None:
            self._end(signal.SIGKILL)
            raise RuntimeError(f"containerd did not start:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        """End all containers, then containerd, then unmount what is left."""
        if self._process is not None and self._process.poll() is None:
            self._end_containers()
            self._end(signal.SIGTERM)
        for path in self._mounts():
            subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def ctr(self, *arguments: str, check: bool = True, namespace: str | None = None) -> str:
        """Run `ctr` against this containerd.

        Returns:
            Its standard output.

        Raises:
            RuntimeError: it failed, unless `check` is false.
        """
        done = subprocess.run(
            self.ctr_command(*arguments, namespace=namespace),
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"ctr {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def ctr_command(self, *arguments: str, namespace: str | None = None) -> list[str]:
        """The command line that `ctr` runs, for callers that start it themselves."""
        return ["ctr", "-a", self.address, "-n", namespace or self.namespace, *arguments]

    def run(
        self,
        reference: str,
        *command: str,
        snapshotter: str = "overlayfs",
        options: Sequence[str] = (),
    ) -> str:
        """Run a container of an image that is here, wait for its end, remove it.

        Args:
            options: further options of `ctr run`, e.g. `("--net-host",)`.

        Returns:
            What it wrote to standard output.

        Raises:
            RuntimeError: it could not be started, or its exit status is not 0.
        """
        name = f"lazysnap-test-{uuid.uuid4().hex[:12]}"
        return self.ctr(
            *("run", "--rm", "--snapshotter", snapshotter, *options, reference, name, *command)
        )

    def snapshots(self, snapshotter: str = "overlayfs") -> dict[str, tuple[str, str]]:
        """Key to (parent, kind) of each snapshot, as `ctr snapshots ls` tells."""
        header, *lines = self.ctr("snapshots", "--snapshotter", snapshotter, "ls").splitlines()
        # Columns are aligned with the header; a key may hold a space ("extract-1-a sha256:...").
        parent, kind = header.index("PARENT"), header.index("KIND")
        return {
            line[:parent].strip(): (line[parent:kind].strip(), line[kind:].strip())
            for line in lines
        }

    def snapshot_info(self, key: str, snapshotter: str = "overlayfs") -> dict[str, Any]:
        """`ctr snapshots info`: Kind, Name, Parent, Labels, Created, Updated."""
        text = self.ctr("snapshots", "--snapshotter", snapshotter, "info", key)
        result: dict[str, Any] = json.loads(text)
        return result

    def contents(self) -> dict[str, dict[str, str]]:
        """Digest to labels of each blob in the content store."""
        result = {}
        for line in self.ctr("content", "ls").splitlines()[1:]:
            columns = re.split(r"\t+", line.strip())  # short columns are padded with more tabs
            labels = columns[3] if len(columns) > 3 else "-"
            pairs = [] if labels == "-" else labels.split(",")
            result[columns[0].strip()] = dict(_pairs(pairs))
        return result

    def images(self) -> dict[str, tuple[str, str]]:
        """Name to (media type, digest) of each image."""
        lines = self.ctr("images", "ls").splitlines()[1:]
        return {columns[0]: (columns[1], columns[2]) for columns in map(str.split, lines)}

    def leases(self) -> list[str]:
        """The ids of all leases."""
        return self.ctr("leases", "ls", "-q").split()

    def ingests(self) -> list[str]:
        """The refs of all unfinished writes to the content store."""
        return [line.split()[0] for line in self.ctr("content", "active").splitlines()[1:]]

    def log(self) -> str:
        """Everything containerd logged so far."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def _config(self) -> str:
        disabled = ", ".join(json.dumps(name) for name in _DISABLED)
        lines = [
            "version = 2",
            f"root = {json.dumps(str(self.directory / 'root'))}",
            f"state = {json.dumps(str(self.directory / 'state'))}",
            f"disabled_plugins = [{disabled}]",
            "[grpc]",
            f"address = {json.dumps(self.address)}",
            '[plugins."io.containerd.gc.v1.scheduler"]',
            *(f"{key} = {json.dumps(value)}" for key, value in self._collection.items()),
        ]
        for name, socket in self.proxies.items():
            lines += [
                f"[proxy_plugins.{json.dumps(name)}]",
                'type = "snapshot"',
                f"address = {json.dumps(str(socket))}",
            ]
        return "\n".join(lines) + "\n"

    def _copy_log(self, process: subprocess.Popen[bytes], booted: threading.Event) -> None:
        assert process.stderr is not None
        with self.log_path.open("ab", buffering=0) as log, process.stderr:
            for line in process.stderr:
                log.write(line)
                if b"containerd successfully booted" in line:
                    booted.set()
        booted.set()  # the process ended: `start` sees that

    def _end_containers(self) -> None:
        for namespace in self.ctr("namespaces", "ls", "-q", check=False).split():
            for name in self.ctr("tasks", "ls", "-q", check=False, namespace=namespace).split():
                self.ctr("tasks", "delete", "--force", name, check=False, namespace=namespace)

    def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            # A shim holds the log pipe open as long as it lives; the thread is a daemon.
            self._reader.join(1)
        self._process = None

    def _mounts(self) -> list[str]:
        """Mountpoints under our directory, the deepest first."""
        prefix = f"{self.directory}/"
        with open("/proc/self/mountinfo", "rb") as file:
            paths = [os.fsdecode(line.split(b" ")[4]) for line in file]
        return sorted((path for path in paths if path.startswith(prefix)), key=len, reverse=True)


def _pairs(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        key, _, value = text.partition("=")
        yield key, value


@contextmanager
def private_containerd(
    directory: Path, *, proxies: Mapping[str, str | Path] | None = None
) -> Iterator[PrivateContainerd]:
    """`PrivateContainerd` for `yield` fixtures; shows the log's end when the block fails."""
    with PrivateContainerd(directory, proxies=proxies) as containerd:
        try:
            yield containerd
        except BaseException:
            print(containerd.log()[-4000:])
            raise
