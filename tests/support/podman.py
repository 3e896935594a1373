# SPDX-License-Identifier: Apache-2.0
"""Podman with storage of its own, whose pulls and pushes are plain HTTP.

    with podman(tmp_path / "p", registry.host, store=path) as it:
        it.run("pull", reference)
        it.container(reference, "cat", "/data/hello")

Containers run without a network and outside of systemd. Nothing of the machine's own podman is used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.stack import wait_until

_SECONDS = 300
_FILES = 1024
_POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'


class Podman:
    """See the module.

    Args:
        directory: gets storage, settings and temporary files.
        host: of a registry that is spoken to without TLS.
        store: the additional layer store, or None.

    Attributes:
        storage: where its layers are.
    """

    def __init__(self, directory: Path, host: str, store: Path | None) -> None:
        self.directory = directory
        self.storage = directory / "s"
        self._store = store
        directory.mkdir()
        (directory / "tmp").mkdir()
        (directory / "policy.json").write_text(_POLICY)
        (directory / "registries.conf").write_text(
            f'[[registry]]\nlocation = "{host}"\ninsecure = true\n'
        )
        lines = ["[storage]", 'driver = "overlay"', f'graphroot = "{self.storage}"']
        lines += [f'runroot = "{directory}/run"', "[storage.options]"]
        if store is not None:
            lines.append(f'additionallayerstores = ["{store}:ref"]')
        (directory / "storage.conf").write_text("\n".join(lines) + "\n")

    def command(self, *arguments: str) -> list[str]:
        """The words of a command."""
        places = [f"--root={self.storage}", f"--runroot={self.directory}/run"]
        places += [f"--tmpdir={self.directory}/lib", "--storage-driver=overlay"]
        if self._store is not None:
            places.append(f"--storage-opt=additionallayerstore={self._store}:ref")
        places += ["--cgroup-manager=cgroupfs", "--events-backend=file", "--runtime=runc"]
        policy = [f"--signature-policy={self.directory}/policy.json"]
        head, rest = arguments[0], arguments[1:]
        return ["podman", *places, head, *(policy if head in ("pull", "push") else []), *rest]

    @property
    def environment(self) -> dict[str, str]:
        """What podman is to be told by its environment."""
        return {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.directory / "registries.conf"),
            "TMPDIR": str(self.directory / "tmp"),
        }

    def container_command(self, reference: str, *command: str) -> list[str]:
        """The words that run a container; podman's default limits are more than a container may have."""
        options = ("--rm", "--network=none", "--pull=never", f"--ulimit=nofile={_FILES}:{_FILES}")
        return self.command("run", *options, "--ulimit=nproc=1024:1024", reference, *command)

    def container(self, reference: str, *command: str) -> str:
        """Run a container to its end; its output.

        Raises:
            AssertionError: it failed.
        """
        return self._run(self.container_command(reference, *command), check=True).stdout

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        Raises:
            AssertionError: it failed, and `check` was given.
        """
        return self._run(self.command(*arguments), check=check)

    def _run(self, words: Sequence[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done

    def start(self, words: Sequence[str]) -> subprocess.Popen[str]:
        """Begin to run a command."""
        return subprocess.Popen(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def remove_image(self, reference: str) -> None:
        """Remove an image, when the last container of it has gone; that can end after `run` has.

        Raises:
            TimeoutError: it stays in use.
        """
        wait_until(lambda: self.run("rmi", reference, check=False).returncode == 0)

    def remove_containers(self) -> None:
        """Remove all containers, also what is left of those that were killed.

        What is mounted for one of these may be in use for a moment by its own clean-up; Podman forgets
        the container then, and leaves its files to who asks for what others have made (`--external`).

        Raises:
            TimeoutError: one stays.
        """

        def gone() -> bool:
            self.run("rm", "--all", "--force", "--time=0", check=False)
            left = self.run("ps", "--all", "--external", "--quiet").stdout.split()
            if left:
                self.run("rm", "--force", "--time=0", *left, check=False)
            return not left

        wait_until(gone)

    def close(self) -> None:
        """Remove all containers and images."""
        self.run("rm", "--all", "--force", "--time=0", check=False)
        self.run("rmi", "--all", "--force", check=False)
        self._end_created()
        for path in Path("/sys/fs/cgroup").glob("*/libpod_parent"):
            for each in (*sorted(path.rglob("*/"), reverse=True), path):
                with contextlib.suppress(OSError):  # somebody else has containers
                    each.rmdir()

    def _end_created(self) -> None:
        """End containers that a podman had created, and not noted yet, when it was killed."""
        ours = f"upperdir={self.storage}/"
        groups = Path("/sys/fs/cgroup").glob("*/libpod_parent/libpod-*/cgroup.procs")
        for pid in {pid for path in groups for pid in path.read_text().split()}:
            with contextlib.suppress(OSError):
                if ours in Path(f"/proc/{pid}/mountinfo").read_text():
                    os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def podman(directory: Path, host: str, store: Path | None = None) -> Iterator[Podman]:
    """A podman, without containers and images at the end.

    Args:
        directory: to be made; its path is short.
        host: of a registry that is spoken to without TLS.
        store: the additional layer store.
    """
    it = Podman(directory, host, store)
    try:
        yield it
    finally:
        it.close()
