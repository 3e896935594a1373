# SPDX-License-Identifier: Apache-2.0
"""`lazysnap drain` on a real stack: afterwards nothing needs the registry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lazysnap.cli import main
from tests.support.outage import registry_stopped
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

CONFIG = """
[shards]
count = 1
[fetch]
background = false
learn_profiles = false
"""
# A request to a registry that hangs fails sooner than `--patience` ends.
_IMPATIENT = "[registry]\nretry_seconds = 3\nstall_seconds = 3\n"


def _command(it: Stack, *arguments: str) -> list[str]:
    root = str(it.lazysnap.root)
    return [sys.executable, "-m", "lazysnap", "drain", "--root", root, *arguments]


def _drain(it: Stack, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        _command(it, "--json", *arguments), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _complete(it: Stack) -> dict[str, bool]:
    """By layer, as the worker sees it."""
    layers = [
        layer for shard in it.lazysnap.shards() for layer in it.lazysnap.call(shard, "status")
    ]
    return {layer["layer"]: layer["local_files"] == layer["files"] for layer in layers}


def test_what_was_drained_needs_no_registry(tmp_path: Path) -> None:
    with stack(tmp_path, config=CONFIG) as it:
        payload = os.urandom(800_000).hex().encode()
        one = it.push_busybox("one", ["estargz"] * 3, payload=payload)
        other = it.push_busybox("other", ["zstd"] * 3, payload=b"other" * 100_000)
        wanted = {layer["digest"] for layer in it.pull(one)["layers"]}
        it.pull(other)
        assert not all(_complete(it)[digest] for digest in wanted)
        result = _drain(it, one)
        assert result["complete"]
        assert {layer["layer"] for layer in result["layers"]} == wanted
        complete = _complete(it)
        assert all(complete[digest] for digest in wanted)
        assert not all(complete.values())  # the other image was not asked for
        it.lazysnap.stop()  # not needed either
        assert _drain(it)["complete"]
        assert all(_complete(it).values())
        it.start_daemon()
        subprocess.run(["sh", "-c", "sync; echo 1 >/proc/sys/vm/drop_caches"], check=True)
        with registry_stopped(it):
            assert it.run(one, "cat", "/data/payload").encode() == payload
            assert it.run(other, "cat", "/data/payload") == "other" * 100_000


def test_a_worker_that_is_replaced_is_asked_again(tmp_path: Path) -> None:
    slowly = CONFIG.replace("[fetch]", "[fetch]\nbytes_per_second = 500_000")
    with stack(tmp_path, config=slowly) as it:
        payload = os.urandom(1_000_000).hex().encode()
        reference = it.push_busybox("slow", ["estargz"] * 3, payload=payload)
        it.pull(reference)
        with subprocess.Popen(_command(it, "--json"), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            shard, worker = next(iter(it.lazysnap.workers().items()))

            def begun() -> bool:
                layers = it.lazysnap.call(shard, "status")
                return any(layer["fetched_by_class"]["prefetch"] for layer in layers)

            wait_until(begun)
            os.kill(worker, signal.SIGKILL)
            result = json.loads(process.stdout.read())
        assert process.returncode == 0
        assert result["complete"]
        assert it.lazysnap.workers()[shard] != worker


def test_what_cannot_be_fetched_is_said(tmp_path: Path) -> None:
    with stack(tmp_path, config=CONFIG + _IMPATIENT) as it:
        payload = os.urandom(800_000).hex().encode()
        reference = it.push_busybox("gone", ["estargz"] * 3, payload=payload)
        it.pull(reference)
        with registry_stopped(it):
            result = _drain(it, "--patience", "8s", code=1)
            assert not result["complete"]
            missing = [layer for layer in result["layers"] if not layer["complete"]]
            assert any(layer["lastError"] for layer in missing)
        assert _drain(it)["complete"]
        unknown = CliRunner().invoke(main, ["drain", "--root", str(it.lazysnap.root), "r/none"])
        assert (unknown.exit_code, "no image r/none" in unknown.output) == (1, True)


def test_nothing_to_drain(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["drain", "--root", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, "0 of 0 lazy layers are completely local\n")
