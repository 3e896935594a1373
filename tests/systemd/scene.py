# SPDX-License-Identifier: Apache-2.0
"""A machine with a container that reads files of a lazy image without end, and what those reads met."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.support import images, layers
from tests.support.docker_registry import DockerRegistry
from tests.support.stack import wait_until
from tests.systemd import reader
from tests.systemd.machine import Machine

CONTAINER = "survivor"
# What the daemon unpacks takes more rights than what it serves.
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep
_SPECIAL = [
    layers.directory("special", uid=1000, gid=1001, mode=0o1777),
    layers.file("special/setuid", b"x", uid=1000, mode=0o6755),
    layers.file("special/capable", b"x", xattrs={"security.capability": CAPABILITY}),
    layers.LayerEntry("special/null", "char", device=(1, 3), mode=0o666),
]
# Of each kind: how many files, and how large each is.
_FILES = {"again": (12, 120_000), "new": (400, 40_000), "asked": (16, 40_000)}
# What lies between two files that are read when asked to, as neighbours come along with what is read.
_GAP = 1_000_000
_OUT = "/srv/reader"


@dataclass(frozen=True)
class Read:
    """One read of the container.

    Attributes:
        kind: `again` or `new`, see `tests/systemd/reader.py`.
        began: by CLOCK_MONOTONIC, in seconds.
        seconds: how long it took.
        outcome: `right`, `wrong` or the name of an errno.
        path: of the file.
    """

    kind: str
    began: float
    seconds: float
    outcome: str
    path: str

    @classmethod
    def parse(cls, line: str) -> Self:
        kind, began, seconds, outcome, path = line.split()
        return cls(kind, float(began), float(seconds), outcome, path)


@dataclass(frozen=True)
class Window:
    """Reads that ended within some time.

    Attributes:
        reads: in the order in which they ended.
        local: paths of the files that are local at its end.
    """

    reads: list[Read]
    local: frozenset[str]

    @property
    def failed(self) -> list[Read]:
        return [each for each in self.reads if each.outcome != "right"]

    @property
    def fetched(self) -> set[str]:
        """The files that were read and are local now, although nothing was when it began."""
        return {each.path for each in self.reads if each.outcome == "right"} & self.local

    def __str__(self) -> str:
        """For people: what stands in the output of the tests."""
        longest = max((each.seconds for each in self.reads), default=0.0)
        return (
            f"{len(self.reads)} reads, {len(self.fetched)} files fetched by them, "
            f"{len(self.failed)} errors, longest {1000 * longest:.0f} ms"
        )


@dataclass
class Scene:
    """A machine with a container of a lazy image; `start_container` starts that.

    Attributes:
        machine: where all of it is.
        reference: of the image.
        files: digest of each file, by kind and path; the container reads `again` and `new` by itself.
    """

    machine: Machine
    reference: str
    files: dict[str, dict[str, str]]
    _asked: Iterator[tuple[str, str]] = field(init=False)
    _reads: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        # In no order that somebody could guess.
        asked = list(self.files["asked"].items())
        self._asked = itertools.cycle(random.Random(3).sample(asked, len(asked)))

    def start_container(self) -> None:
        it = self.machine
        wanted = [
            f"{kind} {digest} {path}\n"
            for kind in ("again", "new")
            for path, digest in self.files[kind].items()
        ]
        it.add(f"{_OUT}/list", "".join(wanted))
        it.add(f"{_OUT}/log", "")
        shutil.copy(reader.__file__, it.root / _OUT.lstrip("/"))
        # The machine's Python, as the image has none.
        binds = [("/usr", "/usr", "ro"), ("/usr/lib", "/lib", "ro"), ("/usr/lib64", "/lib64", "ro")]
        binds.append((_OUT, _OUT, "rw"))
        mounts = [f"type=bind,src={a},dst={b},options=rbind:{mode}" for a, b, mode in binds]
        it.ctr(
            # No share of the CPU: that takes a controller, which the host may have in use.
            *("run", "--detach", "--snapshotter", "lazysnap", "--cpu-shares", "0"),
            *(word for mount in mounts for word in ("--mount", mount)),
            *(self.reference, CONTAINER, "/usr/bin/python3", "-IS"),
            *(f"{_OUT}/reader.py", f"{_OUT}/list", f"{_OUT}/log"),
        )
        # From now on containerd starts it again; it would race with `ctr run`.
        self.restart_always("running")

    def restart_always(self, status: str) -> None:
        label = f"containerd.io/restart.status={status}"
        self.machine.ctr("containers", "label", CONTAINER, label)

    def task(self) -> tuple[str, str]:
        """Process id and state of the container."""
        lines = self.machine.ctr("tasks", "ls").splitlines()[1:]
        (task,) = [words for words in map(str.split, lines) if words[0] == CONTAINER]
        return task[1], task[2]

    def running(self) -> bool:
        lines = self.machine.ctr("tasks", "ls").splitlines()
        return any(line.split()[0] == CONTAINER and "RUNNING" in line for line in lines[1:])

    # -- what the container reads by itself ---------------------------------------------------------

    def _log(self) -> Path:
        return self.machine.root / _OUT.lstrip("/") / "log"

    def noted(self) -> int:
        """How much the container has noted by now; for `reads` and `read_more`."""
        return self._log().stat().st_size

    def reads(self, since: int) -> list[Read]:
        """All reads that ended since then, but one that is just being noted."""
        with self._log().open("rb") as file:
            file.seek(since)
            whole, _, _ = file.read().decode().rpartition("\n")
        return [Read.parse(line) for line in whole.splitlines()]

    def read_more(self) -> None:
        """Wait until some reads of both kinds began from now on, and ended."""
        since = self.noted()

        def enough() -> bool:
            kinds = [each.kind for each in self.reads(since)]
            return min(kinds.count("again"), kinds.count("new")) > 2

        wait_until(enough)

    def forget(self) -> int:
        """Have everything fetched again, as new files do not last for ever; `noted` after that."""
        self.machine.lazysnap("cache", "prune", "--all")
        # What the kernel has looked up, it could read on although it is removed.
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return self.noted()

    def fetch_more(self, since: int) -> None:
        """Wait until something was fetched since then by what the container reads by itself.

        For two seconds a worker reads on what it has open, although it was removed.
        """
        wait_until(lambda: any(path in self.files["new"] for path in self.window(since).fetched))

    def window(self, since: int) -> Window:
        """The reads since then, and what is local now."""
        return Window(self.reads(since), self.local())

    def local(self) -> frozenset[str]:
        """Paths of the files that need not be fetched."""
        names = {path.name for path in self.machine.state.glob("cache/objects/*/*")}
        names |= {path.name for path in self.machine.state.glob("cache/aside/*/*")}
        everything: Iterable[dict[str, str]] = self.files.values()
        return frozenset(
            path for files in everything for path, digest in files.items() if digest in names
        )

    # -- what it reads when it is asked to ----------------------------------------------------------

    def read_on(self) -> None:
        # Others may have come along with one that was read.
        local = self.local()
        unread = (next(self._asked) for _ in self.files["asked"])
        path, digest = next(each for each in unread if each[0] not in local)
        # By its exit status, as `ctr tasks exec` can lose the output of a process that ends soon.
        self.machine.ctr(
            *("tasks", "exec", "--exec-id", f"read{next(self._reads)}", CONTAINER),
            *("sh", "-c", f"echo '{digest}  {path}' | sha256sum -c"),
        )


def push_image(directory: Path, registry: DockerRegistry) -> tuple[str, dict[str, dict[str, str]]]:
    """Push a lazy image; its reference, and the digest of each file by kind and path."""
    rng = random.Random(11)  # data, not a secret
    files: dict[str, dict[str, str]] = {}
    entries: dict[str, list[layers.LayerEntry]] = {}
    for kind, (count, size) in _FILES.items():
        files[kind], entries[kind] = {}, []
        for number in range(count):
            data = rng.randbytes(size)
            # Each in a directory of its own, so that nobody guesses that they are read one by one.
            name = f"{kind}{number}"
            entries[kind] += [layers.directory(name), layers.file(f"{name}/f", data)]
            files[kind][f"/{name}/f"] = hashlib.sha256(data).hexdigest()
            if kind == "asked":
                entries[kind].append(layers.file(f"{name}/gap", rng.randbytes(_GAP)))
    # The end of a layer comes along with its table of contents.
    end = layers.file("end", rng.randbytes(2_000_000))
    made = [layers.estargz(images.busybox_tars()[0])]
    made.append(layers.estargz([*entries["again"], *entries["new"], end]))
    made.append(layers.estargz([*entries["asked"], end]))
    made.append(layers.plain(_SPECIAL))
    converted = [images.Layer(m.blob, m.diff_id, m.media_type, m.annotations) for m in made]
    layout = images.write_layout(directory / "layout", converted)
    return images.push(layout, registry.host, "lazy"), files
