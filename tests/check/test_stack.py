# SPDX-License-Identifier: Apache-2.0
"""`lazysnap check` on a whole stack, while one part of it after the other breaks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from fixtures.processes import accepts
from lazysnap import mounts
from lazysnap.check import daemon, mount_points, shards, state, store
from lazysnap.check.finding import Context, Finding, Level, Probe
from lazysnap.shard.calls import Health, HealthState
from tests.check.scene import look
from tests.support import layers
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

CONFIG = """
[shards]
count = 1
[fetch]
background = false
"""
PROBE_ALWAYS = "[registry]\nprobe_valid_seconds = 0.0\n"
PROBES = (*daemon.PROBES, *mount_points.PROBES, *shards.PROBES)


@dataclass
class Checked:
    """A stack with a lazy image, and what `lazysnap check` needs to know of it."""

    it: Stack
    reference: str
    context: Context

    def check(self, *options: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
        """Run the command: its exit code, and what it finds that is not `ok`, by probe."""
        ctx = self.context
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lazysnap", "check", "--json", "--root", ctx.root),
                *("--config", str(self.it.directory / "config.toml"), "--address", ctx.address),
                *("--containerd", ctx.containerd, *options),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        found: dict[str, list[dict[str, str]]] = {}
        for finding in json.loads(done.stdout):
            if finding["level"] != "ok":
                found.setdefault(finding["id"], []).append(finding)
        return done.returncode, found

    async def look(self, probe: str, probes: tuple[Probe, ...] = PROBES) -> list[Finding]:
        return await look(self.context, probes, probe)


@pytest.fixture
def checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Checked]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with stack(tmp_path, config=CONFIG + getattr(request, "param", "")) as it:
        reference = it.push_busybox("lazy", ["estargz", "estargz", "plain"])
        it.pull(reference)
        yield Checked(
            it,
            reference,
            Context(
                root=str(it.lazysnap.root),
                address=str(it.lazysnap.address),
                containerd=it.containerd.address,
            ),
        )


def test_a_healthy_stack(checked: Checked) -> None:
    before = mounts.mounted_below(str(checked.it.directory))
    code, found = checked.check("--image", checked.reference)
    # a small or nearly full disk of the machine, and an old kernel, are not what is tested
    found = {name: rows for name, rows in found.items() if name not in _OF_THE_MACHINE}
    image = found.pop("image")
    assert found == {}
    assert [row["level"] for row in image] == ["info", "info", "warning"]
    assert "no-toc-digest" in image[2]["summary"]
    assert code == 1  # for that layer
    assert mounts.mounted_below(str(checked.it.directory)) == before
    assert checked.it.run(checked.reference, "echo", "works") == "works\n"


_OF_THE_MACHINE = (
    "space",
    "kernel-release",
    "overlay-data-only",
    "erofs-file",
    "kernel-trees",
    "fuse-limits",
)


def test_without_a_daemon_and_containerd(checked: Checked) -> None:
    checked.it.lazysnap.kill()
    code, found = checked.check()
    assert code == 2
    assert {name for name in found if name not in _OF_THE_MACHINE} == {"daemon"}
    checked.it.containerd.stop()
    code, found = checked.check("--fix")
    assert code == 2
    assert found["containerd"][0]["level"] == "failure"
    assert "shards" not in found
    assert "mounts" not in found


async def test_a_root_that_another_daemon_serves(checked: Checked, tmp_path: Path) -> None:
    other = Checked(
        checked.it,
        "",
        Context(
            root=str(tmp_path / "other"),
            address=checked.context.address,
            containerd=checked.context.containerd,
        ),
    )
    (found,) = await other.look("daemon")
    assert (found.level, "does not serve" in found.summary) == (Level.WARNING, True)
    elsewhere = Context(
        root=checked.context.root,
        address=str(tmp_path / "x"),
        containerd=checked.context.containerd,
    )
    (found,) = await look(elsewhere, PROBES, "daemon")
    assert (found.level, checked.context.address in found.summary) == (Level.FAILURE, True)


async def test_another_release(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazysnap.__version__", "99.0")
    for probe in ("daemon", "shards"):
        (found,) = await checked.look(probe)
        assert found.level is Level.WARNING
        assert "99.0" in found.summary


async def test_a_worker_without_a_keeper(checked: Checked) -> None:
    keepers = checked.it.lazysnap.keepers()
    assert await checked.look("shards") == []
    os.kill(keepers[0], signal.SIGKILL)
    wait_until(lambda: not state.runs(keepers[0], "lazysnap.shard.keeper"))
    (found,) = await checked.look("shards")
    assert (found.level, "no keeper" in found.summary) == (Level.WARNING, True)
    assert await checked.look("layers") == []
    assert await checked.look("shard-mounts") == []


async def test_a_worker_that_hangs(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = checked.it.lazysnap.workers()[0]
    checked.it.lazysnap.stop()  # it would kill the worker
    monkeypatch.setattr(shards, "_CALL_SECONDS", 0.5)
    os.kill(worker, signal.SIGSTOP)
    try:
        (found,) = await checked.look("shards")
        assert (found.level, "does not answer" in found.summary) == (Level.FAILURE, True)
        (found,) = await checked.look("shard-mounts")
        assert (found.level, "hangs" in found.summary) == (Level.FAILURE, True)
        assert await checked.look("layers") == []  # nobody to ask: the others have told
        # The process must be able to end, which one with a thread that waits for FUSE cannot.
        code = (
            "import sys\n"
            "from lazysnap.check import shards\n"
            "from lazysnap.cli import main\n"
            "shards._CALL_SECONDS = 0.5\n"
            "main(sys.argv[1:])"
        )
        done = await trio.run_process(
            [sys.executable, "-c", code, "check", "--root", checked.context.root],
            capture_stdout=True,
            check=False,
        )
        assert done.returncode == 2
        assert b"hangs" in done.stdout
    finally:
        os.kill(worker, signal.SIGCONT)
    monkeypatch.undo()
    assert await checked.look("shard-mounts") == []


async def test_shards_that_died(checked: Checked) -> None:
    checked.it.lazysnap.kill()
    checked.it.lazysnap.kill_shards()
    (found,) = await checked.look("shards")
    assert (found.level, "no processes" in found.summary) == (Level.FAILURE, True)
    (found,) = await checked.look("shard-mounts")
    assert (found.level, "fails" in found.summary) == (Level.FAILURE, True)
    # as after a restart of the machine
    mounts.unmount_below(checked.context.root)
    (found,) = await checked.look("mounts")
    assert (found.level, "2 lazy layers" in found.summary) == (Level.FAILURE, True)
    (found,) = await checked.look("shard-mounts")
    assert "nothing is mounted" in found.summary
    checked.it.start_daemon()
    for probe in PROBES:
        # The new worker gives a registry little time to answer.
        with trio.fail_after(60):
            while found := await checked.look(probe.id):
                assert probe.id == "layers", found
                await trio.sleep(0.5)


async def test_layers_that_cannot_be_read(checked: Checked) -> None:
    worker = checked.it.lazysnap.workers()[0]
    checked.it.lazysnap.stop()
    for index in (checked.it.lazysnap.root / "cache/index").iterdir():
        index.unlink()
    assert await checked.look("layers") == []  # it has them open
    assert [f.level for f in await checked.look("slots", store.PROBES)] == [Level.FAILURE] * 2
    os.kill(worker, signal.SIGKILL)
    with trio.fail_after(60):
        while not any(s.who and s.who.pid != worker for s in await shards.shards(checked.context)):
            await trio.sleep(0.05)
    found = await checked.look("layers")
    assert [finding.level for finding in found] == [Level.FAILURE] * 2
    assert all(checked.reference in finding.summary for finding in found)


@pytest.mark.parametrize(
    ("checked", "damage"), [("", "other bytes"), (PROBE_ALWAYS, "gone")], indirect=["checked"]
)
async def test_layers_that_the_registry_has_no_more(checked: Checked, damage: str) -> None:
    content = random.Random(1).randbytes(400_000)  # more than comes along with the index
    reference = checked.it.push("big", [layers.estargz([layers.file("file", content)])])
    checked.it.pull(reference)
    (record,) = [r for r in state.slots(checked.context)[0] if r.reference == reference]
    name = record.layer_digest.partition(":")[2]
    blobs = checked.it.directory / "storage/docker/registry/v2/blobs/sha256"
    blob = blobs / name[:2] / name / "data"
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(bytes(blob.stat().st_size))
        file = checked.it.lazysnap.root / f"shards/{record.shard}/{record.slot}/file"
        done = await trio.run_process(["cat", file], check=False, capture_stderr=True)
        assert done.returncode != 0
    (found,) = [f for f in await checked.look("layers") if record.layer_digest in f.summary]
    level, says = (Level.FAILURE, "cannot be read") if damage == "gone" else (Level.INFO, "errors")
    assert (found.level, says in found.summary) == (level, True)


async def test_mount_namespaces(checked: Checked) -> None:
    assert await checked.look("mount-namespace") == []
    ctx = checked.context
    code = (
        "from lazysnap.check import daemon\n"
        "from lazysnap.check.finding import Context\n"
        f"c = Context(root={ctx.root!r}, address={ctx.address!r}, containerd={ctx.containerd!r})\n"
        "print([f.level.value for f in daemon.namespace(c)])"
    )
    command = ["unshare", "--mount", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: ASYNC221
    assert "['warning']" in done.stdout, done.stderr


async def test_a_containerd_that_does_not_see_our_mounts(checked: Checked, tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.bind(sys.argv[1]); s.listen()\n"
        "time.sleep(600)"
    )
    command = ["unshare", "--mount", sys.executable, "-c", code, str(path)]
    process = await trio.lowlevel.open_process(command)
    try:
        with trio.fail_after(60):
            while not accepts(path):
                await trio.sleep(0.02)
        ctx = replace(checked.context, containerd=str(path))
        (found,) = await look(ctx, PROBES, "mount-namespace")
        assert (found.level, "PrivateTmp" in found.hint) == (Level.FAILURE, True)
    finally:
        process.kill()
        await process.wait()


def test_what_is_left_can_be_mended_once_the_daemon_is_stopped(checked: Checked) -> None:
    odd, orphan = (checked.it.lazysnap.root / name for name in ("shards/odd", "snapshots/4711"))
    odd.mkdir()
    mounts.bind(str(odd), str(odd))
    _, found = checked.check("--fix")
    assert "stop lazysnap serve" in found["unknown-mounts"][0]["hint"]
    checked.it.lazysnap.stop()
    (orphan / "fs").mkdir(parents=True)
    mounts.bind(str(orphan), str(orphan / "fs"))
    _, found = checked.check("--fix")
    assert ["unmounted" in row["fixed"] for row in found["unknown-mounts"]] == [True, True]
    assert "removed" in found["snapshots"][0]["fixed"]
    assert not orphan.exists()
    checked.it.start_daemon()
    assert checked.it.run(checked.reference, "echo", "works") == "works\n"
    _, found = checked.check()
    assert not found.keys() & {"unknown-mounts", "snapshots", "mounts", "shards", "slots"}


@pytest.mark.parametrize(
    ("health", "level"),
    [
        ("local", None),
        ("reachable", None),
        ("degraded", Level.WARNING),
        ("unreachable", Level.FAILURE),
        ("failed", Level.FAILURE),
    ],
)
def test_all_states_of_a_layer(health: str, level: Level | None) -> None:
    found = shards.judge_layer("layer x", Health(HealthState(health), "because"))
    assert [finding.level for finding in found] == ([] if level is None else [level])
