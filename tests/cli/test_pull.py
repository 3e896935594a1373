# SPDX-License-Identifier: Apache-2.0
"""The command `lazysnap pull` as a process: output, exit codes, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.pull.conftest import daemon, serve, server
from tests.support.containerd import PrivateContainerd
from tests.support.images import busybox_layers, write_layout
from tests.support.registry import Break, FaultyRegistry, Hold

pytestmark = [pytest.mark.root, pytest.mark.containerd]

__all__ = ["daemon", "server"]  # fixtures of tests/pull
LAZYSNAP = (sys.executable, "-m", "lazysnap")


async def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [*LAZYSNAP, *arguments], capture_stdout=True, capture_stderr=True, check=False
    )


def options(daemon: PrivateContainerd) -> list[str]:
    return ["--address", daemon.address, "--snapshotter", "overlayfs"]


async def test_json_and_text(
    tmp_path: Path, daemon: PrivateContainerd, server: FaultyRegistry
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers())
    reference = serve(server, layout)
    done = await run("pull", reference.name, "--plain-http", "--json", *options(daemon))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["digest"] == result["manifest"] == layout.manifest
    assert (result["lazyLayers"], result["totalLayers"]) == (0, 3)
    assert [layer["state"] for layer in result["layers"]] == ["unpacked"] * 3
    assert result["bytesDownloaded"] == sum(len(layer.blob) for layer in layout.layers)
    assert b"layer 3/3" in done.stderr
    done = await run("pull", reference.name, "--namespace", "other", *options(daemon))
    assert done.returncode == 0, done.stderr
    assert b"0 of 3 layers lazy" in done.stdout
    daemon.namespace = "other"
    assert list(daemon.images()) == [reference.name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_leaves_nothing(
    tmp_path: Path,
    daemon: PrivateContainerd,
    server: FaultyRegistry,
    number: signal.Signals,
    code: int,
) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(bytes(range(256)) * 40000))
    reference = serve(server, layout)
    server.faults.append(Break(after=1000, how="stall", path=layout.layers[1].digest))
    async with trio.open_nursery() as nursery:
        command = [*LAZYSNAP, "pull", reference.name, *options(daemon)]
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, check=False, capture_stderr=True)
        )
        with trio.fail_after(120):
            await server.stalled.wait()
            # The lowest layer is committed, the second one's snapshot is active.
            while not any(kind == "Active" for _, kind in daemon.snapshots().values()):
                await trio.sleep(0.02)
            assert len(daemon.leases()) == 1
            process.send_signal(number)
            assert await process.wait() == code
    assert daemon.snapshots() == {}
    assert daemon.leases() == []
    assert daemon.ingests() == []
    assert daemon.images() == {}
    assert daemon.contents() == {}


async def test_what_a_killed_pull_has_staged_goes_with_its_lease(
    tmp_path: Path, daemon: PrivateContainerd, server: FaultyRegistry
) -> None:
    """Upper layers are unpacked into snapshots that only the lease keeps."""
    layout = write_layout(tmp_path / "image", busybox_layers(b"payload"))
    reference = serve(server, layout)
    server.faults.append(Hold(trio.Event(), path=layout.layers[0].digest))
    root = daemon.directory / "root/io.containerd.snapshotter.v1.overlayfs/snapshots"
    command = [*LAZYSNAP, "pull", reference.name, *options(daemon)]
    process = await trio.lowlevel.open_process(command)
    try:
        with trio.fail_after(120):
            while not (list(root.glob("*/fs/etc/motd")) and list(root.glob("*/fs/data/payload"))):
                await trio.sleep(0.02)
    finally:
        process.kill()
        await process.wait()
    staged = [key for key in daemon.snapshots() if " staged " in key]
    assert len(staged) == 2
    (lease,) = daemon.leases()
    await trio.to_thread.run_sync(daemon.ctr, "leases", "rm", "--sync", lease)
    assert daemon.snapshots() == {}
    with trio.fail_after(120):
        while any(root.iterdir()):
            await trio.sleep(0.02)


async def test_errors_are_messages_with_hints(tmp_path: Path, server: FaultyRegistry) -> None:
    done = await run("pull", "Not:A:Reference")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"lazysnap: ")
    done = await run("pull", "localhost/app", "--address", str(tmp_path / "none.sock"))
    assert done.returncode == 1
    assert b"there is no such socket" in done.stderr
    assert b"hint: " in done.stderr
    assert b"Traceback" not in done.stderr


async def test_an_absent_image(daemon: PrivateContainerd, server: FaultyRegistry) -> None:
    done = await run("pull", f"{server.host}/none:1", *options(daemon))
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"none" in done.stderr
    assert daemon.leases() == []


async def test_a_command_loads_only_what_it_needs() -> None:
    program = (
        "import sys; from lazysnap.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*(m for m in ('pyfuse3', 'grpc', 'httpx', 'sqlite3', 'trio') if m in sys.modules))"
    )
    for arguments, expected in ((["--help"], b""), (["pull", "--help"], b"")):
        done = await trio.run_process(
            [sys.executable, "-c", program, *arguments], capture_stdout=True
        )
        assert done.stdout.splitlines()[-1] == expected
