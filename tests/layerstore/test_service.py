# SPDX-License-Identifier: Apache-2.0
"""`lazysnap store` as a service: it takes up a changed configuration, and counts."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.layerstore.scene import CONFIG, Scene
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.podman]


def _reload(it: Scene, text: str) -> str:
    """Change the file, send SIGHUP, wait until it was dealt with; what was logged since."""
    before = len(it.store.log())
    it.store.reload(text)

    def done() -> bool:
        since = it.store.log()[before:]
        return "configuration reloaded" in since or "configuration not reloaded" in since

    wait_until(done)
    return it.store.log()[before:]


def test_a_changed_configuration_is_taken_up(it: Scene) -> None:
    payload = os.urandom(5 << 20)
    reference = it.push("app", ["estargz"] * 3, payload)
    it.podman.run("pull", reference)
    worker = it.store.who()["pid"]
    said = _reload(it, CONFIG + "no_such_key = 1\n")
    assert "configuration not reloaded" in said
    said = _reload(it, f"{CONFIG.replace('background = false', 'background = true')}"
                       "background_delay_seconds = 0\n[shards]\nmax_background = 3\n")  # fmt: skip
    assert "configuration changed key=fetch.background was=False now=True" in said
    assert "this change takes a restart key=shards.max_background" in said
    assert "goes on with the settings it has" not in said
    # Nobody reads, so it is the background that fetches.
    wait_until(lambda: it.network.received > len(payload))
    assert it.store.who()["pid"] == worker
    # What a layer is called is still known to the next worker, too.
    os.kill(worker, signal.SIGKILL)
    assert it.podman.container(reference, "cat", "/data/hello") == "hello from the top layer\n"


def test_metrics_are_served(it: Scene) -> None:
    reference = it.push("app", ["estargz"] * 3, b"some")
    socket = it.directory / "metrics.sock"
    it.store.stop()
    it.store.start(f"--metrics-address=unix:{socket}")
    it.podman.run("pull", reference)
    assert it.podman.container(reference, "cat", "/data/payload") == "some"
    words = ["curl", "-sSf", "--unix-socket", str(socket), "http://localhost/metrics"]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples["lazysnap_lazy_layers"]) == 3
    # by the worker, whom Podman asks for the names of layers
    assert float(samples['lazysnap_fuse_request_seconds_count{operation="lookup"}']) > 3
