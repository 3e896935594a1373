# SPDX-License-Identifier: Apache-2.0
"""A changed configuration and SIGHUP: what follows, what needs a restart, what changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lazysnap import config
from lazysnap.config import Config
from lazysnap.config_file import parse
from tests.support.stack import Stack, stack, wait_until

SECONDS = 120
FIRST = "[shards]\ncount = 1\n[fetch]\nbackground = false\nlearn_profiles = false\n"


def _reload(it: Stack, text: str) -> str:
    """Change the file, send SIGHUP, wait until it was dealt with; what was logged since."""
    (it.directory / "config.toml").write_text(text)
    before = len(it.lazysnap.log())
    os.kill(it.lazysnap.pid, signal.SIGHUP)

    def done() -> bool:
        since = it.lazysnap.log()[before:]
        return "configuration reloaded" in since or "configuration not reloaded" in since

    wait_until(done, SECONDS)
    return it.lazysnap.log()[before:]


def _layers(it: Stack) -> list[dict[str, Any]]:
    return [layer for shard in it.lazysnap.shards() for layer in it.lazysnap.call(shard, "status")]


def _cached(it: Stack) -> int:
    cache = it.lazysnap.root / "cache"
    found = 0
    for kind in ("objects", "aside", "partial"):
        for path in (cache / kind).rglob("*"):
            try:
                found += path.stat().st_blocks * 512 if path.is_file() else 0
            except FileNotFoundError:
                continue
    return found


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_workers_follow_without_a_restart(tmp_path: Path) -> None:
    with stack(tmp_path, config=FIRST) as it:
        payload = os.urandom(500_000).hex().encode()
        reference = it.push_busybox("follow", ["estargz"] * 3, payload=payload)
        it.pull(reference)
        worker = it.lazysnap.workers()
        assert any(layer["local_bytes"] < layer["bytes"] for layer in _layers(it))
        said = _reload(it, FIRST.replace("false", "true\nbackground_delay_seconds = 0", 1))
        assert "configuration changed key=fetch.background was=False now=True" in said
        assert "settings reloaded" in said
        wait_until(
            lambda: all(layer["local_bytes"] == layer["bytes"] for layer in _layers(it)), SECONDS
        )
        limit = 2_600_000
        _reload(it, f"{FIRST}[cache]\nsize_limit_bytes = {limit}\n")
        wait_until(lambda: _cached(it) <= limit, SECONDS)
        assert it.lazysnap.workers() == worker
        assert it.run(reference, "cat", "/data/payload").encode() == payload


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_what_needs_a_restart_is_said_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    with stack(tmp_path, config=FIRST) as it:
        said = _reload(it, FIRST.replace("count = 1", "count = 2") + "[lazy]\nenabled = false\n")
        assert "this change takes a restart key=shards.count was=1 now=2" in said
        assert "this change takes a restart key=lazy.enabled was=True now=False" in said
        said = _reload(it, "log_level = 'debug'\n[shards]\ncuont = 1\n")
        assert "configuration not reloaded" in said
        assert "config.toml:3: there is no key shards.cuont" in said
        assert "did you mean 'count'?" in said
        said = _reload(it, f'log_format = "json"\n{FIRST}')
        assert '"msg": "configuration reloaded"' in said
        assert '"msg": "settings reloaded"' in said  # by the worker
        reference = it.push_busybox("after", ["estargz"] * 3)
        assert it.pull(reference)["lazyLayers"] == 3
        assert "goes on with the settings it has" not in it.lazysnap.log()
        it.lazysnap.stop()
        it.lazysnap.kill_shards()


def test_only_what_can_follow_does() -> None:
    new = parse('log_level = "debug"\nroot = "/x"\n[cache]\nreserve_bytes = 5\n', "f")
    taken = config.reloaded(Config(), new)
    assert (taken.log_level, taken.root, taken.cache.reserve_bytes) == (
        "debug",
        Config().root,
        5,
    )
    assert [key.path for key in config.changed(taken, new)] == ["root"]
