# SPDX-License-Identifier: Apache-2.0
"""Workers and keepers that come, go and break."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lazysnap
from fixtures.processes import alive
from lazysnap import mounts
from lazysnap.errors import Internal
from lazysnap.layers.slots import remove_slot
from lazysnap.shard.keeper import pause
from tests.shard.scene import NUMBER, Shard, shard
from tests.support import layers
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse]

LAYER = layers.estargz([layers.file("f", b"content"), layers.file("g", b"other")])


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Shard]:
    with shard(tmp_path) as it:
        yield it


def test_a_restarted_worker_serves_what_was_open(it: Shard) -> None:
    data = random.Random(1).randbytes(3 << 20)
    tree = it.attach(layers.estargz([layers.file("f", data)], chunk_size=1 << 18))
    keeper, worker = it.pids()
    with (tree / "f").open("rb", buffering=0) as file:
        assert file.read(10) == data[:10]
        it.call("restart")
        it.wait_for_another_worker(than=worker)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() is not None
        assert os.pread(file.fileno(), len(data), 0) == data
    assert it.pids()[0] == keeper


def test_a_restarted_worker_is_of_the_release_on_disk(tmp_path: Path) -> None:
    code = tmp_path / "code"
    shutil.copytree(Path(lazysnap.__file__).parent, code / "lazysnap")
    with shard(tmp_path) as it:
        assert it.process is not None
        it.process.terminate()
        it.process.wait(60)
        it.start(python_path=code)
        worker = it.pids()[1]
        init = code / "lazysnap" / "__init__.py"
        init.write_text(init.read_text().replace(lazysnap.__version__, "99.1.2"))
        it.call("restart")
        it.wait_for_another_worker(than=worker)
        assert it.call("ping")["version"] == "99.1.2"


def test_sigterm_unmounts_and_ends_all(it: Shard) -> None:
    tree = it.attach(LAYER)
    worker = it.pids()[1]
    held = os.open(tree / "f", os.O_RDONLY)  # so that the detached mount lives on
    try:
        assert it.process is not None
        it.process.terminate()
        assert it.process.wait(60) == 0
    finally:
        with contextlib.suppress(OSError):  # nobody is there to be told of it
            os.close(held)
    assert mounts.mounted_at(str(it.mountpoint)) is None
    assert not alive(worker)


def test_unmounting_ends_the_keeper(it: Shard) -> None:
    subprocess.run(["umount", str(it.mountpoint)], check=True)
    assert it.process is not None
    assert it.process.wait(60) == 0


def test_an_aborted_connection_ends_the_keeper(it: Shard, tmp_path: Path) -> None:
    device = next(p for p in mounts.mount_points() if p.path == str(it.mountpoint)).device
    control = tmp_path / "control"
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", str(control)], check=True)
    (control / device.partition(":")[2] / "abort").write_text("1")
    subprocess.run(["umount", str(control)], check=True)
    assert it.process is not None
    assert it.process.wait(60) == 0
    assert mounts.mounted_at(str(it.mountpoint)) is None


def test_a_second_keeper_is_refused(it: Shard) -> None:
    command = [sys.executable, "-P", "-m", "lazysnap.shard.keeper", "--root", str(it.root)]
    done = subprocess.run(
        [*command, "--number", str(NUMBER)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, "has a keeper already" in done.stderr) == (3, True)
    assert it.call("ping")["shard"] == NUMBER


def test_a_worker_that_cannot_start_is_tried_again_without_haste(it: Shard) -> None:
    worker = it.pids()[1]
    objects = it.root / "cache" / "objects"
    shutil.rmtree(objects)
    objects.write_text("in the way")
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: it.log.count("worker ended with 70") >= 4)
    assert it.log.count("worker ended with 70") < 12
    objects.unlink()
    it.wait_for_another_worker(than=worker)
    # None of the dead ones is left as a zombie.
    children = Path(f"/proc/{it.pids()[0]}/task/{it.pids()[0]}/children").read_text().split()
    assert [int(pid) for pid in children] == [it.pids()[1]]


def test_a_worker_that_has_served_is_replaced_at_once_however_often_it_is_killed() -> None:
    assert [pause(failures, lived=2.0) for failures in range(100)] == [0.0] * 100
    assert pause(100, lived=0.5) > 1


def test_a_worker_asks_for_enough_descriptors(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The worker inherits this process's limit, and this process has files of its own open.
    limit = len(os.listdir("/proc/self/fd")) + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        with shard(tmp_path) as it:
            files = {f"{n:04}": b"%d" % n for n in range(limit + 300)}
            tree = it.attach(layers.estargz([layers.file(k, v) for k, v in files.items()]))
            for name, data in files.items():
                assert (tree / name).read_bytes() == data
            limits = Path(f"/proc/{it.pids()[1]}/limits").read_text()
            (line,) = [x for x in limits.splitlines() if x.startswith("Max open files")]
            assert int(line.split()[3]) > 10_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Damage.


def test_a_damaged_index_is_an_error_until_it_is_repaired(it: Shard) -> None:
    path = it.index_path(1)
    tree = it.attach(LAYER)
    good = path.read_bytes()
    _, worker = it.pids()
    for number, damaged in enumerate((b"", good[:100], good[:-5] + b"12345")):
        path.unlink()  # the old one is mapped
        path.write_bytes(damaged)
        it.call("restart")
        it.wait_for_another_worker(than=worker)
        worker = it.pids()[1]
        health = it.call("health", slots=[1])[1]
        assert health["state"] == "failed"
        assert "index" in health["detail"]
        with pytest.raises(OSError) as caught:
            (tree / f"unknown to the kernel {number}").lstat()
        assert caught.value.errno == errno.EIO
        with pytest.raises(Internal):
            it.call("attach", slot=1)
        path.write_bytes(good)
        assert it.call("health", slots=[1])[1]["state"] in ("reachable", "local")
        assert (tree / "f").read_bytes() == b"content"


def test_a_detached_slot_is_gone(it: Shard) -> None:
    tree, other = it.attach(LAYER), it.attach(LAYER)
    with (tree / "g").open("rb", buffering=0) as file:
        remove_slot(str(it.root), 1)
        it.call("detach", slots=[1])
        with pytest.raises(OSError) as caught:
            file.read()
        assert caught.value.errno == errno.ESTALE
    wait_until(lambda: not tree.exists())
    assert os.listdir(it.mountpoint) == ["2"]
    assert (other / "f").read_bytes() == b"content"


def test_a_read_that_fails_is_an_error_and_the_next_one_works(it: Shard) -> None:
    blobs = it.registry.blobs
    tree = it.attach(LAYER)
    del blobs[LAYER.digest]
    with pytest.raises(OSError) as caught:
        (tree / "f").read_bytes()
    assert caught.value.errno == errno.EIO
    it.registry.add_blob(LAYER.blob)
    assert (tree / "f").read_bytes() == b"content"
    (status,) = it.call("status", slots=[1])
    assert status["errors"] > 0
    assert "not" in status["last_error"]


def test_wrong_bytes_of_a_registry_are_never_seen(it: Shard) -> None:
    tree = it.attach(LAYER)
    wrong = layers.estargz([layers.file("f", b"CONTENT"), layers.file("g", b"OTHER")])
    it.registry.blobs[LAYER.digest] = wrong.blob[: LAYER.size].ljust(LAYER.size, b"\0")
    for name in ("f", "g"):
        with pytest.raises(OSError) as caught:
            (tree / name).read_bytes()
        assert caught.value.errno == errno.EIO
    it.registry.blobs[LAYER.digest] = LAYER.blob
    assert (tree / "g").read_bytes() == b"other"


def test_a_defect_in_a_call_leaves_the_shard_alive(it: Shard) -> None:
    it.attach(LAYER)
    for arguments in ({"slots": "x"}, {"slots": [None]}, {}, {"slot": 1}):
        try:
            it.call("health", **arguments)
        except Internal as error:
            assert "health" in str(error)
    assert it.call("health", slots=[1, 77])[77]["state"] == "failed"


def test_a_layer_is_known_to_be_complete_before_anybody_asks(tmp_path: Path) -> None:
    """As a start would wait until each of its files was looked for."""
    valid, delay = {"probe_valid_seconds": 3600.0}, {"background_delay_seconds": 0.0}
    with shard(tmp_path, background=True, **valid, **delay) as it:
        it.attach(LAYER)
        # Bytes came lately, so that `health` itself does not look.
        wait_until(lambda: it.call("health", slots=[1])[1]["state"] == "local")
