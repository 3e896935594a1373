# SPDX-License-Identifier: Apache-2.0
"""`lazysnap mount` and `umount` with a root of their own, and what they may leave behind.

with scene(tmp_path) as it:
    it.mount(reference)               # at it.point
    it.umount()
    it.assert_clean()
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fixtures.processes import alive, kill_leftovers, unmount_below
from tests.support import images, layers
from tests.support.stack import wait_until

_MAKERS = {
    "estargz": layers.estargz,
    "zstd": layers.zstd_chunked,
    "plain": layers.plain,
    "plain-zstd": lambda tar: layers.plain(tar, "zstd"),
}
# What may stay of a root: its database and lock, and what was fetched.
_STAYS = {"metadata.db", "lock", "standalone", "cache", "profiles", "snapshots"}
SECONDS = 300
TOP = Path(__file__).parents[2]


class Scene:
    """See the module.

    Attributes:
        root: of the mounts.
        point: a mount point.
        before: words that come before those of each command.
    """

    before: Sequence[str] = ()

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.point = directory / "m"
        self.point.mkdir(parents=True)

    def new_point(self) -> Path:
        """Another mount point."""
        path = self.directory / f"m{os.urandom(4).hex()}"
        path.mkdir()
        return path

    def command(self, name: str, *arguments: object) -> list[str]:
        """The words of a command."""
        words = [*self.before, sys.executable, "-m", "lazysnap", name, "--root", str(self.root)]
        return [*words, *(str(argument) for argument in arguments)]

    def crash(self, step: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command that is killed at a step, see `tests.standalone.crash`."""
        words = self.command(*(str(argument) for argument in arguments))[len(self.before) + 3 :]
        return subprocess.run(
            [*self.before, sys.executable, "-m", "tests.standalone.crash", str(step), *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=TOP,
            timeout=SECONDS,
        )

    def run(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever becomes of it."""
        return subprocess.run(
            self.command(name, *arguments),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )

    def mount(
        self, reference: str, *options: str, point: Path | None = None
    ) -> list[dict[str, Any]]:
        """Mount an image; its layers as `--json` tells them."""
        done = self.run("mount", reference, point or self.point, "--json", *options)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)["layers"]
        return found

    def umount(self, *options: str, point: Path | None = None) -> bool:
        """Unmount it; whether it was mounted."""
        done = self.run("umount", point or self.point, "--json", *options)
        assert done.returncode == 0, done.stderr
        return bool(json.loads(done.stdout)["unmounted"])

    def processes(self) -> list[int]:
        """All that have the root, or what is in it, on their command line."""
        needle = os.fsencode(self.root)
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if any(_leads_to(word, needle) for word in words) and alive(int(name)):
                    found.append(int(name))
        return found

    def workers(self) -> list[int]:
        """Those of them that are workers of shards."""
        keepers = {int(path.read_text()) for path in (self.root / "shards").glob("*.lock")}
        shards = []
        for pid in self.processes():
            if b"lazysnap.shard.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                shards.append(pid)
        return [pid for pid in shards if pid not in keepers]

    def mounts(self) -> list[str]:
        """The mount points below the scene's directory."""
        return mounts_below(self.directory)

    def assert_clean(self) -> None:
        """No mount, no process, no directory is left but the cache."""
        assert self.mounts() == []
        assert self.processes() == []
        assert os.listdir(self.point) == []
        if self.root.exists():
            assert {path.name for path in self.root.iterdir()} <= _STAYS
            assert list((self.root / "cache").glob("new-*")) == []
            assert not (self.root / "snapshots").exists() or not any(
                (self.root / "snapshots").iterdir()
            )


def _leads_to(word: bytes, root: bytes) -> bool:
    return word == root or root + b"/" in word


def mounts_below(directory: Path, process: int | str = "self") -> list[str]:
    """The mount points below a directory, as a process has them."""
    lines = Path(f"/proc/{process}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{directory}/")]


@contextlib.contextmanager
def scene(directory: Path) -> Iterator[Scene]:
    """A root, and the end of everything that uses it."""
    it = Scene(directory)
    try:
        yield it
    finally:
        unmount_below(directory)
        kill_leftovers(directory)
        wait_until(lambda: not it.processes())
        unmount_below(directory)


def layout(
    directory: Path, forms: Sequence[str], payload: bytes = b"", tag: str = "latest"
) -> images.Layout:
    """The busybox image as an OCI layout.

    Args:
        directory: to be made.
        forms: of its three layers, bottom first: `estargz`, `zstd`, `plain`, `plain-zstd`.
        payload: content of `/data/payload`, in the middle layer.
        tag: name of the image in the layout.
    """
    tars = images.busybox_tars(payload)
    made = [_MAKERS[form](tar) for form, tar in zip(forms, tars, strict=True)]
    return images.write_layout(
        directory,
        [images.Layer(each.blob, each.diff_id, each.media_type, each.annotations) for each in made],
        tag=tag,
    )
