# SPDX-License-Identifier: Apache-2.0
"""`eager = "direct"`: layers are unpacked while the client still waits for those below them.

The registry holds back the lowest layer, so that the others are ahead for sure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from fixtures.processes import alive
from tests.pull.conftest import serve
from tests.support import images, layers, tree
from tests.support.registry import FaultyRegistry, Hold, Status, faulty_registry
from tests.support.stack import SNAPSHOTTER, Stack, stack
from tests.unpack.direct import CONFIG, left_over, seen
from tests.unpack.stacked import HIGH, LOW

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

_SECONDS = 120

_NEED_LOWER = {2}  # a directory behind what is in it: only known when the one below is


@pytest.fixture
async def server() -> AsyncIterator[FaultyRegistry]:
    async with faulty_registry() as server:
        yield server


@pytest.fixture
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    # not tmp_path: the name of a long test makes a path too long for a socket
    with stack(tmp_path_factory.mktemp("s"), config=CONFIG) as it:
        yield it


class _Held:
    """An image in a registry that keeps back its lowest layer.

    Attributes:
        reference: of the image.
        layers: its layers, lowest first.
        release: to be set when the lowest layer may come.
    """

    def __init__(self, server: FaultyRegistry, entries: list[list[layers.LayerEntry]]) -> None:
        self._server = server
        self.layers = [images.gzip_layer(layers.make_tar(each)) for each in entries]
        with tempfile.TemporaryDirectory() as place:
            layout = images.write_layout(Path(place) / "layout", self.layers)
            self.reference = serve(server, layout).name
        self.release = trio.Event()
        server.faults.append(Hold(self.release, path=self.layers[0].digest, times=1000))

    def sent(self, numbers: list[int]) -> bool:
        """Whether these layers were sent as a whole."""
        return all(
            any(r.sent == len(self.layers[n].blob) for r in self._server.requests(path=digest))
            for n, digest in ((n, self.layers[n].digest) for n in numbers)
        )


async def _until(condition: Callable[[], object]) -> None:
    with trio.fail_after(_SECONDS):
        while not condition():
            await trio.sleep(0.01)


def _appliers(it: Stack) -> list[int]:
    """Processes of the daemon that unpack."""
    command = ["pgrep", "-P", str(it.lazysnap.pid), "-f", "lazysnap.unpack.process"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def _start_pull(it: Stack, reference: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lazysnap", "pull", reference, "--plain-http"]
    options = ["--address", it.containerd.address, "--snapshotter", SNAPSHOTTER]
    with (it.directory / "pull.log").open("ab") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=log)


@pytest.mark.parametrize("high", [[0], [0, 1], [2], [0, 1, 2, 3, 4]], ids=str)
async def test_the_tree_is_containerds(
    it: Stack, server: FaultyRegistry, high: list[int], tmp_path: Path
) -> None:
    held = _Held(server, [LOW, *(HIGH[number] for number in high)])
    pulled: list[dict[str, object]] = []

    async def pull() -> None:
        pulled.append(await trio.to_thread.run_sync(it.pull, held.reference))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull)
        await _until(lambda: held.sent(list(range(1, len(high) + 1))))
        held.release.set()
    assert pulled[0]["bytesDownloaded"] == 0
    await _until(lambda: not left_over(it))
    assert it.lazysnap.log().count("ahead=True") == len(set(high) - _NEED_LOWER)
    command = ("images", "pull", "--plain-http", held.reference)
    await trio.to_thread.run_sync(lambda: it.containerd.ctr(*command))
    found = [
        await trio.to_thread.run_sync(seen, it, name, tmp_path / name)
        for name in (SNAPSHOTTER, "overlayfs")
    ]
    left = [
        each
        for each in tree.differences(*found)
        # containerd gives directories that a layer leaves out the time at which it unpacks
        if not (each.path in (b".", b"a", b"a/b", b"late") and each.field == "mtime")
    ]
    assert left == [], tree.report(left)
    assert found[0][b"a"]["uid"] == "11"


async def test_only_a_few_are_ahead(it: Stack, server: FaultyRegistry) -> None:
    # The largest come first: with these sizes, the lowest ones, so that the next in turn is ahead.
    sizes = range(9000, 1000, -1000)
    entries = [[layers.file(f"f{size}", os.urandom(size))] for size in sizes]
    held = _Held(server, entries)
    most = 0
    upper = [layer.digest for layer in held.layers[1:]]
    later = trio.Event()
    for digest in upper:
        server.faults.append(Hold(later, path=digest, times=1000))

    def waiting() -> int:
        nonlocal most
        found = len([r for r in server.log if r.path.rpartition("/")[2] in upper and not r.status])
        most = max(most, found)
        return found

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, it.pull, held.reference)
        await _until(lambda: waiting() >= 3)
        # Each that comes after one that was let go would be the fourth if there were no limit.
        held.release.set()
        await _until(lambda: waiting() >= 3 and len(_appliers(it)) == 3)
        later.set()
    assert most == 3
    asked = [r.path.rpartition("/")[2] for r in server.log]
    first = sorted(upper, key=asked.index)[:3]
    assert sorted(first) == sorted(upper[:3])
    await _until(lambda: not left_over(it))


@pytest.mark.parametrize("whole", [True, False], ids=["unpacked", "on their way"])
async def test_nothing_is_left_of_a_pull_that_was_killed(
    it: Stack, server: FaultyRegistry, whole: bool
) -> None:
    held = _Held(server, [LOW, HIGH[0], HIGH[3]])
    upper = [layer.digest for layer in held.layers[1:]]
    if not whole:
        server.faults += [Hold(trio.Event(), path=digest, times=1) for digest in upper]
    process = _start_pull(it, held.reference)
    try:
        if whole:
            await _until(lambda: held.sent([1, 2]) and len(_appliers(it)) == 1)
        else:
            await _until(lambda: all(server.requests(path=digest) for digest in upper))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    await _until(lambda: not left_over(it) and not _appliers(it))
    held.release.set()
    await trio.to_thread.run_sync(it.pull, held.reference)
    await _until(lambda: not left_over(it))


async def test_nothing_is_left_when_the_daemon_is_killed(it: Stack, server: FaultyRegistry) -> None:
    held = _Held(server, [LOW, HIGH[0], HIGH[3]])
    process = _start_pull(it, held.reference)
    await _until(lambda: held.sent([1, 2]) and len(_appliers(it)) == 1)
    pids = _appliers(it)
    it.lazysnap.kill()
    await trio.to_thread.run_sync(process.wait)
    await _until(lambda: not any(alive(pid) for pid in pids))
    held.release.set()
    await trio.to_thread.run_sync(it.start_daemon)
    await _until(lambda: not left_over(it))
    result = await trio.to_thread.run_sync(it.pull, held.reference)
    assert result["bytesDownloaded"] == 0


async def test_what_fails_ahead_is_left_to_containerd(it: Stack, server: FaultyRegistry) -> None:
    held = _Held(server, [LOW, HIGH[0], HIGH[3]])
    server.faults.append(Status(404, path=held.layers[1].digest, times=1))
    async with trio.open_nursery() as nursery:

        async def pull() -> None:
            result = await trio.to_thread.run_sync(it.pull, held.reference)
            assert result["bytesDownloaded"] == len(held.layers[1].blob)

        nursery.start_soon(pull)
        await _until(lambda: held.sent([2]) and server.requests(path=held.layers[1].digest))
        held.release.set()
    assert it.lazysnap.log().count("a layer is left to containerd") == 1
    await _until(lambda: not left_over(it))


async def test_other_bytes_are_refused(it: Stack, server: FaultyRegistry) -> None:
    held = _Held(server, [LOW, HIGH[0], HIGH[3]])
    other = images.gzip_layer(layers.make_tar([layers.file("evil", b"x")])).blob
    digest = held.layers[1].digest
    server.blobs[digest] = other.ljust(len(held.layers[1].blob), b"\0")
    failures: list[str] = []

    async def pull() -> None:
        try:
            await trio.to_thread.run_sync(it.pull, held.reference)
        except RuntimeError as error:
            failures.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull)
        await _until(lambda: held.sent([2]) and server.requests(path=digest))
        held.release.set()
    assert len(failures) == 1
    assert digest in failures[0]
    assert len(it.containerd.snapshots(SNAPSHOTTER)) <= 1  # the lowest layer


async def test_an_applier_that_is_killed(it: Stack, server: FaultyRegistry) -> None:
    """Both are: the one whose turn it is, and the one ahead."""
    held = _Held(server, [LOW, HIGH[3]])
    later = trio.Event()
    server.faults.append(Hold(later, path=held.layers[1].digest, times=1))
    async with trio.open_nursery() as nursery:

        async def pull() -> None:
            result = await trio.to_thread.run_sync(it.pull, held.reference)
            low, high = (len(each.blob) for each in held.layers)
            # A pull that is slow now finds the upper layer given up, and it is begun anew.
            assert result["bytesDownloaded"] in (low, low + high)

        nursery.start_soon(pull)
        await _until(lambda: len(_appliers(it)) == 2)
        for pid in _appliers(it):
            os.kill(pid, signal.SIGKILL)
        later.set()
        held.release.set()
    assert "a layer is left to containerd" in it.lazysnap.log()
    await _until(lambda: not left_over(it))
