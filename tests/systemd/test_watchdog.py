# SPDX-License-Identifier: Apache-2.0
"""Pings for systemd's watchdog; that systemd acts on them is tests/system/test_systemd.py's."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from fixtures.processes import kill_leftovers, unmount_below
from lazysnap import watchdog
from lazysnap.errors import Internal
from tests.support.stack import wait_until


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as it:
        it.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        it.setblocking(False)
        yield it


def _messages(it: socket.socket) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(it.recv(4096))
    return found


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 10),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 10),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_when_it_pings(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog.period(environment) == (seconds and pytest.approx(seconds))


async def test_no_ping_without_an_answer(
    notified: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    state = "well"

    async def answers() -> None:
        if state == "hangs":
            await trio.sleep_forever()
        if state == "fails":
            raise Internal("the database is damaged")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watchdog.run, answers)
        await trio.sleep(35)
        assert _messages(notified) == [b"WATCHDOG=1"] * 4
        state = "fails"
        await trio.sleep(30)
        assert _messages(notified) == []
        state = "well"
        await trio.sleep(30)
        assert _messages(notified) == [b"WATCHDOG=1"] * 3
        state = "hangs"
        await trio.sleep(300)
        assert _messages(notified) == []
        nursery.cancel_scope.cancel()


@pytest.mark.root
@pytest.mark.fuse
def test_the_daemon_says_what_systemd_wants_to_know(
    notified: socket.socket, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[shards]\ncount = 1\n")
    heard: list[bytes] = []

    def heard_of(message: bytes) -> bool:
        heard.extend(_messages(notified))
        return message in heard

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "lazysnap", "serve", "--config", str(config)),
                *("--root", str(tmp_path / "r"), "--address", str(tmp_path / "l.sock")),
            ],
            env={**os.environ, "WATCHDOG_USEC": "600000000"},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: heard_of(b"READY=1") and heard_of(b"WATCHDOG=1"))
        process.terminate()
        assert process.wait(120) == 0
        assert heard_of(b"STOPPING=1")
        # The first ping is there at once, and the next after 200 s.
        assert sorted(heard) == [b"READY=1", b"STOPPING=1", b"WATCHDOG=1"]
    finally:
        process.kill()
        process.wait()
        unmount_below(tmp_path)
        kill_leftovers(tmp_path)
