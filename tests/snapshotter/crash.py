# SPDX-License-Identifier: Apache-2.0
"""Ends a snapshotter at many lines of its code, and looks at what a new one makes of the remains.

`python -m tests.snapshotter.crash DIRECTORY EVERY` prints a JSON object: at how many lines it was
ended (at every EVERY-th of about a thousand), and what went wrong. A program of its own because it
forks, which a process with threads cannot do safely: a child does the operations and is ended at one
line; a second child starts anew. A line counts once in each operation. The mount namespace should be
private to it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import trio

from lazysnap import mounts
from lazysnap.errors import AlreadyExists
from lazysnap.snapshotter import Snapshotter
from lazysnap.snapshotter.interfaces import Attached, Lower
from lazysnap.store.records import Attachment
from lazysnap.store.snapshots import SnapshotStore

TRACED = ("/lazysnap/snapshotter/", "/lazysnap/store/")
REF = {"containerd.io/snapshot.ref": "sha256:ref"}
LATER = {"containerd.io/snapshot.ref": "sha256:later"}
CRASHED = 77
Point = tuple[int, str, int]
State = dict[str, tuple[int, str, str, dict[str, str]]]


class Bound:
    """Lazy layers that are a directory, bound where it is wanted: some only when they have a place."""

    def __init__(self, source: Path) -> None:
        self.source = str(source)
        self.hidden: set[int] = set()

    async def restore(self, attached: Sequence[Attached]) -> None:
        for each in attached:
            if mounts.mounted_at(each.mountpoint) is None:
                mounts.bind(self.source, each.mountpoint)

    async def mount(
        self,
        slot: int,
        labels: Mapping[str, str],
        mountpoint: str,
        lowers: Sequence[object] = (),
    ) -> Attachment:
        if labels == REF:
            mounts.bind(self.source, mountpoint)
        else:
            self.hidden.add(slot)
        return Attachment(slot, 0, "sha256:layer", b"")

    async def serves(self, attachment: Attachment, labels: Mapping[str, str]) -> bool:
        return True

    def placed(self, attached: Attached) -> None:
        if attached.attachment.slot in self.hidden:
            mounts.bind(self.source, attached.mountpoint)

    async def lowerdirs(self, layers: Sequence[Lower]) -> Sequence[str]:
        return [layer.directory for layer in layers]

    def starting(self, chain: Sequence[Attached]) -> None:
        pass

    async def check(self, chain: Sequence[Attached]) -> None:
        for each in chain:
            assert mounts.mounted_at(each.mountpoint) is not None, each

    async def unmount(self, attached: Attached) -> None:
        mounts.unmount(attached.mountpoint)


async def prepare_lazily(snapshotter: Snapshotter, labels: dict[str, str] = REF) -> None:
    with suppress(AlreadyExists):
        await snapshotter.prepare("extract", "base", labels)
        raise AssertionError("not lazy")


OPERATIONS: tuple[Callable[[Snapshotter], Awaitable[object]], ...] = (
    lambda s: s.prepare("key", labels={"a": "1"}),
    lambda s: s.commit("base", "key", {"b": "2"}),
    prepare_lazily,
    lambda s: prepare_lazily(s, LATER),
    lambda s: s.prepare("container", "sha256:ref@1"),
    lambda s: s.view("view", "base"),
    lambda s: s.update("base", {"b": "3"}),
    lambda s: s.remove("container"),
    lambda s: s.remove("sha256:ref@1"),
    lambda s: s.remove("sha256:later@1"),
    lambda s: s.cleanup(),
)


class Tracer:
    """Notes the lines that run in an operation, or ends the process at one of them."""

    def __init__(self, end_at: Point | None = None) -> None:
        self.operation = -1
        self.seen: set[Point] = set()
        self.end_at = end_at

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Tracer | None:
        if not any(part in frame.f_code.co_filename for part in TRACED):
            return None
        if event == "line" and self.operation >= 0:
            point = (self.operation, frame.f_code.co_filename, frame.f_lineno)
            if point == self.end_at:
                os._exit(CRASHED)
            self.seen.add(point)
        return self

    def install(self) -> None:
        threading.settrace(self)
        sys.settrace(self)


def state(root: Path) -> State:
    store = SnapshotStore(str(root / "metadata.db"))
    try:
        return {s.name: (s.id, s.kind.name, s.parent, dict(s.labels)) for s in store.walk()}
    finally:
        store.close()


def operate(root: Path, tracer: Tracer, note: Callable[[State], object] | None = None) -> None:
    """Do all operations; tell the state before the first and after each."""

    async def run() -> None:
        store = SnapshotStore(str(root / "metadata.db"))
        async with trio.open_nursery() as nursery:
            snapshotter = Snapshotter(str(root), store, filesystem=Bound(root.parent / "layer"))
            await snapshotter.start(nursery)
            for number, operation in enumerate(OPERATIONS):
                if note:
                    note(state(root))
                tracer.operation = number
                await operation(snapshotter)
                tracer.operation = -1
            if note:
                note(state(root))
            await snapshotter.aclose()
        store.close()

    root.mkdir()
    tracer.install()
    trio.run(run)


def recover(root: Path, allowed: Sequence[State]) -> None:
    """Start anew; raises when something is lost, left over or out of order."""

    async def run() -> None:
        store = SnapshotStore(str(root / "metadata.db"))
        async with trio.open_nursery() as nursery:
            snapshotter = Snapshotter(str(root), store, filesystem=Bound(root.parent / "layer"))
            await snapshotter.start(nursery)
            await snapshotter.cleanup()
            found = state(root)
            assert found in allowed, f"{found} is none of {allowed}"
            ids = {str(each[0]) for each in found.values()}
            assert set(os.listdir(root / "snapshots")) == ids
            lazy = {f"{root}/snapshots/{n}/fs" for n in store.attachments()}
            mounted = {point.path for point in mounts.mounted_below(str(root))}
            assert mounted == lazy, f"mounted {mounted}, should be {lazy}"
            for name, (number, kind, parent, _) in found.items():
                assert os.path.isdir(root / f"snapshots/{number}/fs"), name
                if kind != "COMMITTED":
                    await snapshotter.mounts(name)
                else:
                    await snapshotter.usage(name)
                assert not parent or parent in found
            # and it goes on
            await snapshotter.prepare("afterwards")
            assert str(store.stat("afterwards").id) in os.listdir(root / "snapshots")
            await snapshotter.aclose()
        store.close()

    trio.run(run)


def forked(function: Callable[..., None], *args: Any) -> tuple[int, str]:
    """Run a function in a child: its exit status and what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            function(*args)
        except BaseException:
            os.write(writer, traceback.format_exc()[-3000:].encode())
            status = 1
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def rehearse(root: Path, result: Path) -> None:
    """Do everything once, to know the lines and the states."""
    states: list[State] = []
    tracer = Tracer()
    operate(root, tracer, states.append)
    result.write_text(json.dumps([states, sorted(tracer.seen)]))


def main(top: Path, every: int) -> None:
    (top / "layer").mkdir()
    status, error = forked(rehearse, top / "rehearsal", top / "rehearsal.json")
    assert status == 0, error
    told, points = json.loads((top / "rehearsal.json").read_text())
    states = [{name: (*v[:3], v[3]) for name, v in each.items()} for each in told]
    failures: list[str] = []
    crashed = 0
    for number, point in enumerate(points[::every]):
        root = top / str(number)
        status, error = forked(operate, root, Tracer((point[0], point[1], point[2])))
        # a line of background work may come at another time, or not at all
        if status not in (0, CRASHED):
            failures.append(f"{point}: {error}")
        crashed += status == CRASHED
        allowed = states[-1:] if status == 0 else states[point[0] : point[0] + 2]
        status, error = forked(recover, root, allowed)
        if status != 0:
            failures.append(f"{point}: {error}")
        mounts.unmount_below(str(root))
    print(json.dumps({"crashed": crashed, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
