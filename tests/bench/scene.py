# SPDX-License-Identifier: Apache-2.0
"""One side of a comparison, cold: a fresh containerd, a fresh snapshotter, and an image to pull.

All sides are treated alike; what differs between them stands in `Side`. Nothing of a scene is left
when its block ends, except the state of a peer that runs on its own: it is told to remove its images,
and the command that resets it is run before the next scene.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixtures import sides
from fixtures.containerd import Containerd
from fixtures.images.catalogue import Built
from fixtures.processes import FixtureError, accepts, clear, daemon, run
from tests.support import compare

from . import slots
from .ledger import Totals
from .origin import Network, Origin

OVERLAYFS = "overlayfs"
LAZYSNAP = "lazysnap"
_SETTLE_SECONDS = 90
_QUIET_SECONDS = 12
"""For so long it must have rested: snapshotters wait a while before they work in the background."""
_AT_REST = 0.03
"""Seconds of CPU per second that a snapshotter may use which has nothing to do."""


@dataclass(frozen=True)
class Side:
    """A snapshotter to measure.

    Attributes:
        name: The name under which containerd knows it.
        program: Of a peer that is started for each scene, as lazysnap is; it has to take
            ``--address`` and ``--root``.
        socket: Of a peer that runs already.
        reset: Shell command that makes a peer forget everything and leaves it serving.
    """

    name: str
    program: Path | None = None
    socket: Path | None = None
    reset: str = ""

    @property
    def form(self) -> str:
        """The form of images it is made for."""
        return "plain" if self.name == OVERLAYFS else "esgz"


class Scene:
    """What `scene` yields; see the module.

    Args:
        work: Its directory.
        side: The snapshotter.
        network: The way to the registry.
        origin: The registry.
        client: The containerd.
        address: The snapshotter's socket, if it is not containerd's own.
        form: The form of images that is pulled.
    """

    def __init__(
        self,
        work: Path,
        side: Side,
        network: Network,
        origin: Origin,
        client: Containerd,
        address: Path | None,
        form: str,
    ) -> None:
        self.work = work
        self.side = side
        self.network = network
        self.origin = origin
        self.client = client
        self._address = address
        self._form = form
        self._mark = origin.mark()

    def pull(self, image: Built) -> float:
        """Pull an image with everything cold; the monotonic time at which that began."""
        reference = self.origin.reference(image, self._form, self.network)
        sides.drop_page_cache()
        self._mark = self.origin.mark()
        began = time.monotonic()
        run([*self._pull_command(), reference], timeout=300)
        return began

    def sent(self) -> Totals:
        """What the registry sent since the pull began."""
        return self.origin.since(self._mark)

    def start(self, image: Built, command: Sequence[str], expected: str) -> float:
        """Run a container of a pulled image; the monotonic time of its first output."""
        reference = self.origin.reference(image, self._form, self.network)
        ended = self.client.run_to_end(
            reference, *command, snapshotter=self.side.name, options=("--net-host",)
        )
        return sides.first_output(ended, expected)

    @contextlib.contextmanager
    def mounted(self, image: Built) -> Iterator[Path]:
        """Mount what a container of a pulled image would see."""
        chain = compare.chain_id(self.origin.server, image.repository, self._form)
        target = self.work / "mounted"
        with compare.root_file_system(self.client, self.side.name, chain, target) as root:
            yield root

    def record(self, image: Built, command: Sequence[str]) -> bytes:
        """Have lazysnap record what a pulled image reads while a command starts; the profile."""
        reference = self.origin.reference(image, self._form, self.network)
        profile = self.work / "profile.json"
        places = ("--address", self.client.address, "--root", self.work / LAZYSNAP)
        words = [sides.LAZYSNAP, "profile"]
        run([*words, "record", *places, reference, "--", *command], timeout=300)
        run([*words, "export", *places, reference, profile], timeout=300)
        return profile.read_bytes()

    def know(self, profile: bytes) -> None:
        """Put a profile where lazysnap keeps those that it has learned."""
        manifest = json.loads(profile)["manifest"].removeprefix("sha256:")
        (self.work / LAZYSNAP / "profiles" / f"{manifest}.json").write_bytes(profile)

    def settle(self) -> None:
        """Wait until the snapshotter rests: what it fetches in the background is there then."""
        if self._address is None:
            return
        end = time.monotonic() + _SETTLE_SECONDS
        used, quiet = self._cpu(), 0
        while time.monotonic() < end:
            time.sleep(1)
            before, used = used, self._cpu()
            quiet = quiet + 1 if used - before <= _AT_REST else 0
            if quiet == _QUIET_SECONDS:
                return
        raise FixtureError(f"{self.side.name} was still busy after {_SETTLE_SECONDS} s")

    def _cpu(self) -> float:
        """Seconds of CPU that the snapshotter's processes have used."""
        ticks = 0
        for pid in self._processes():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Megabytes of memory of all processes of the snapshotter, shared pages shared out (PSS).

        0 for overlayfs, which lives in containerd and the kernel.
        """
        return sum(_pss(pid) for pid in self._processes()) / 1e6

    def disk(self) -> float:
        """Megabytes on disk that the snapshotter uses; for a peer that keeps them elsewhere, 0."""
        if self.side.name == OVERLAYFS:
            folder = self.client.directory / "root/io.containerd.snapshotter.v1.overlayfs"
        else:
            folder = self.work / LAZYSNAP
        return _allocated(folder) / 1e6

    def content(self) -> float:
        """Megabytes on disk of containerd's content store."""
        return _allocated(self.client.directory / "root/io.containerd.content.v1.content") / 1e6

    def _pull_command(self) -> list[str]:
        options = ("--plain-http", "--snapshotter", self.side.name)
        if self.side.name == OVERLAYFS:
            return self.client.command("images", "pull", *options)
        if self.side.name != LAZYSNAP:
            return self.client.command("images", "rpull", *options, client="ctr-remote")
        places = ("--address", self.client.address, "--root", f"{self.work / LAZYSNAP}")
        return [os.fspath(sides.LAZYSNAP), "pull", *places, *options]

    def _processes(self) -> set[int]:
        """The listener of the snapshotter's socket, its descendants, and who bears its directory."""
        if self._address is None:
            return set()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(os.fspath(self._address))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        found = {struct.unpack("iII", credentials)[0]}
        needle = os.fsencode(self.work / LAZYSNAP)
        parents = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    parents[int(entry.name)] = int(stat[1])
                    if needle in (entry / "cmdline").read_bytes():
                        found.add(int(entry.name))
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found


@contextlib.contextmanager
def scene(
    place: Path, origin: Origin, side: Side, network: Network, *, form: str = "", config: str = ""
) -> Iterator[Scene]:
    """Set up a side.

    Args:
        place: Directory of the run; the scene's own is beside it, see `slots`.
        origin: The registry.
        side: The snapshotter.
        network: The way to the registry.
        form: Of the images, if it is not the one that the side is made for.
        config: Content of lazysnap's configuration file.
    """
    work = slots.rested(place.with_name(f"{place.name}-scenes")) / slots.SCENE
    work.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            address = side.socket
            if side.name == LAZYSNAP or side.program is not None:
                address = work / "lazysnap.sock"
                stack.enter_context(_snapshotter(work, address, side.program, config))
            elif side.reset:
                run(["sh", "-c", side.reset], timeout=60)
            plugins = {} if address is None else {side.name: address}
            client = stack.enter_context(Containerd(work, proxies=plugins))
            it = Scene(work, side, network, origin, client, address, form or side.form)
            yield it
            if side.socket is not None:
                for image in client.ctr("images", "ls", "-q").split():
                    client.ctr("images", "rm", "--sync", image)
    except BaseException:
        _keep_logs(work, place.with_name(f"{place.name}-logs"))
        raise
    finally:
        clear(work)


@contextlib.contextmanager
def _snapshotter(work: Path, address: Path, program: Path | None, config: str) -> Iterator[None]:
    log = work / "lazysnap.log"
    command = sides.serve(work, address, program, config)
    with daemon(command, log, lambda: address.exists() and accepts(address)):
        yield


def _keep_logs(work: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for log in (*work.glob("*.log"), *work.glob("containerd/*.log")):
        shutil.copy(log, target)


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended, or is a zombie
    return 0


def _allocated(root: Path) -> int:
    """Bytes on disk below a directory, without what is mounted there."""
    if not root.exists():
        return 0
    done = subprocess.run(
        ["du", "--summarize", "--one-file-system", "--block-size=1", root],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return int(done.stdout.split()[0])
