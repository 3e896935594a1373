# SPDX-License-Identifier: Apache-2.0
"""What must survive: readers and containers, while parts of lazysnap die under them."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import layers
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

# Reads all files of a tree again and again with cold caches, until told to stop by a file; prints a
# line before it begins, and then the number of rounds, or the first error.
_READER = """
import hashlib, os, sys
tree, stop, expected = sys.argv[1:4]
rounds = 0
print("reading", flush=True)
while True:
    names = sorted(os.listdir(tree))
    total = hashlib.sha256()
    for name in names:
        fd = os.open(os.path.join(tree, name), os.O_RDONLY)
        while data := os.read(fd, 1 << 16):
            total.update(data)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if total.hexdigest() != expected:
        sys.exit(f"wrong bytes in round {rounds}")
    rounds += 1
    if os.path.exists(stop):
        break
print(rounds)
"""


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as it:
        yield it


def _big_image(it: Stack, *, files: int = 24, size: int = 700_000) -> tuple[str, str]:
    """Push an image with incompressible files in `/big`; its reference and their digest."""
    rng = random.Random(7)  # data, not a secret
    contents = [rng.randbytes(size) for _ in range(files)]
    entries = [layers.directory("big")]
    entries += [layers.file(f"big/{n:03d}", data) for n, data in enumerate(contents)]
    reference = it.push("big", [layers.estargz(entries, chunk_size=1 << 18)])
    return reference, hashlib.sha256(b"".join(contents)).hexdigest()


def _view(it: Stack, name: str) -> Path:
    """Mount the only committed snapshot of lazysnap."""
    (top,) = [
        key for key, (_, kind) in it.containerd.snapshots("lazysnap").items() if kind == "Committed"
    ]
    target = it.directory / name
    it.mount(name, target, top)
    return target


def test_a_worker_killed_under_readers_is_not_noticed(it: Stack) -> None:
    reference, digest = _big_image(it)
    it.pull(reference)
    tree = _view(it, "view") / "big"
    stop = it.directory / "stop"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, str(tree), str(stop), digest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
    killed = 0
    for _ in range(6):
        time.sleep(0.25)
        for pid in it.lazysnap.workers().values():
            os.kill(pid, signal.SIGKILL)
            killed += 1
    stop.touch()
    results = [reader.communicate(timeout=600) for reader in readers]
    assert killed >= 6
    assert [error for _, error in results if error] == []
    assert all(int(rounds) > 0 for rounds, _ in results)


def test_containers_run_on_while_the_daemon_dies_and_restarts(it: Stack) -> None:
    reference = it.push_busybox(
        "lazy", ["estargz"] * 3, payload=random.Random(1).randbytes(3 << 20)
    )
    it.pull(reference)
    name = f"survivor-{uuid.uuid4().hex[:12]}"  # known to the whole machine
    script = "while [ ! -e /stop ]; do md5sum /data/payload /data/many/* >/dev/null || exit 1; done"
    container = subprocess.Popen(
        it.containerd.command(
            *("run", "--rm", "--snapshotter", "lazysnap", reference, name),
            *("sh", "-c", script),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: "RUNNING" in it.containerd.ctr("tasks", "ls"))
        keepers = it.lazysnap.keepers()
        for end in (it.lazysnap.kill, it.lazysnap.stop):
            end()
            time.sleep(0.5)
            assert container.poll() is None
            it.start_daemon()
        assert it.lazysnap.keepers() == keepers
        it.containerd.ctr("tasks", "exec", "--exec-id", "x1", name, "touch", "/stop")
        output, _ = container.communicate(timeout=300)
        assert (container.returncode, output) == (0, "")
    finally:
        container.kill()
        container.wait()


def test_everything_is_back_after_everything_died_without_a_registry(it: Stack) -> None:
    reference = it.push_busybox("lazy", ["estargz", "zstd", "estargz"])
    it.pull(reference)
    before = it.run(reference, "sh", "-c", "cat /data/hello /etc/motd; ls /data")
    it.lazysnap.kill()
    it.lazysnap.kill_shards()
    os.kill(_registry_pid(it), signal.SIGSTOP)  # it neither answers nor refuses
    try:
        it.start_daemon()
        assert it.run(reference, "sh", "-c", "cat /data/hello /etc/motd; ls /data") == before
    finally:
        os.kill(_registry_pid(it), signal.SIGCONT)


def _registry_pid(it: Stack) -> int:
    """The process that listens at the registry's port."""
    line = subprocess.run(
        ["ss", "-Hltnp", f"sport = :{it.registry.port}"], capture_output=True, text=True, check=True
    ).stdout
    return int(line.split("pid=")[1].split(",")[0])


def test_a_keeper_that_is_gone_is_replaced_and_new_containers_start(it: Stack) -> None:
    reference = it.push_busybox("lazy", ["estargz"] * 3)
    it.pull(reference)
    before = it.lazysnap.keepers()
    it.lazysnap.kill_shards()
    assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"
    # Whoever noticed: the container that was to start, or the watch over the shards.
    assert not set(it.lazysnap.keepers().values()) & set(before.values())


def test_a_damaged_object_is_never_served(it: Stack) -> None:
    reference = it.push_busybox("lazy", ["estargz"] * 3)
    it.pull(reference)
    it.run(reference, "cat", "/data/hello")
    cache = it.lazysnap.root / "cache"
    damaged = 0
    for path in (*cache.glob("objects/??/*"), *cache.glob("aside/??/*")):
        if path.stat().st_size:
            with path.open("r+b") as file:
                first = file.read(1)
                file.seek(0)
                file.write(bytes([first[0] ^ 0xFF]))
            damaged += 1
    assert damaged > 0
    it.lazysnap.kill()
    it.lazysnap.kill_shards()  # with the kernel's page cache of the files
    it.start_daemon()
    assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"
    assert "cached object is wrong" in it.lazysnap.log()
