# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazysnap import journal, log
from tests.support.stack import wait_until

JOURNALD = Path("/lib/systemd/systemd-journald")
# With LOG as the logger, in a process of its own, as the handlers are the process's.
PROGRAM = """
import sys
from lazysnap import log
log.setup(*sys.argv[1:3], **({{"journal_path": sys.argv[3]}} if sys.argv[3:] else {{}}))
LOG = log.get("lazysnap.test")
{body}
"""


def _logged(body: str, level: str = "info", form: str = "text", *more: str) -> list[str]:
    """Lines on standard error of a program that logs."""
    program = PROGRAM.format(body=body)
    done = subprocess.run(
        [sys.executable, "-c", program, level, form, *more],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stderr.splitlines()


def test_text_is_one_line_for_an_event() -> None:
    (line,) = _logged("LOG.info('a layer', layer_digest='sha256:a', error='two\\nlines')")
    assert line.endswith('info    lazysnap.test: a layer layer-digest=sha256:a error="two\\nlines"')


def test_json_is_one_object_for_an_event() -> None:
    body = "LOG.info('a layer', remote_snapshot_prepared='true', time=3, n=None, b=True, p=1.5)"
    body += "\ntry: 1/0\nexcept Exception: LOG.exception('bad', name=b'x')"
    first, second = map(json.loads, _logged(body, "info", "json"))
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "lazysnap.test",
        "msg": "a layer",
        "remote-snapshot-prepared": "true",
        "time-": 3,
        "n": None,
        "b": True,
        "p": 1.5,
    }
    assert "ZeroDivisionError" in second["trace"]


def test_the_level_is_kept_to() -> None:
    assert len(_logged("LOG.info('a'); LOG.warning('b')", "warning")) == 1


def test_the_same_trouble_is_counted_and_summed_up() -> None:
    body = "for n in range(50): LOG.warning('cannot', layer='a', error=n)\n"
    body += "for n in range(3): LOG.warning('cannot', layer='b', error=n)\n"
    body += "LOG.error('cannot', layer='a')\n"
    body += "for n in range(3): LOG.info('done', layer='a')"
    lines = [line.partition("lazysnap.test: ")[2] for line in _logged(body)]
    assert lines == [
        *("cannot layer=a error=0", "cannot layer=b error=0", "cannot layer=a"),
        *["done layer=a"] * 3,
        # at the end of the process
        *("cannot layer=a error=49 repeated=49", "cannot layer=b error=2 repeated=2"),
    ]


def test_after_a_minute_it_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[logging.LogRecord] = []

    class Target(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record)

    now = 100.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    repeats = log._Repeats(Target())
    for seconds in (0, 1, 59, 61, 62):
        now = 100.0 + seconds
        record = logging.LogRecord("n", logging.WARNING, "f", 1, "cannot", (), None)
        record.fields = {"layer": "a", "error": seconds}
        repeats.handle(record)
    assert [record.fields for record in written] == [  # type: ignore[attr-defined]
        {"layer": "a", "error": 0},
        {"layer": "a", "error": 59, "repeated": 2},
        {"layer": "a", "error": 61},
    ]


def test_what_is_remembered_of_repeats_is_bounded() -> None:
    repeats = log._Repeats(logging.NullHandler())
    for number in range(5000):
        record = logging.LogRecord("n", logging.WARNING, "f", 1, "cannot", (), None)
        record.fields = {"layer": number}
        repeats.handle(record)
    assert len(repeats._seen) <= 1000


@pytest.fixture
def journald() -> Iterator[str]:
    """A private namespace of the real journald."""
    if not JOURNALD.exists() or not shutil.which("journalctl") or os.geteuid() != 0:
        pytest.skip("needs systemd, and root")
    name = f"lazysnap-{uuid.uuid4().hex[:12]}"
    socket_path = Path(f"/run/systemd/journal.{name}/socket")
    process = subprocess.Popen([JOURNALD, name], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: socket_path.exists() or process.poll() is not None)
        if process.poll() is not None:
            pytest.skip("journald does not run here")
        yield name
    finally:
        process.terminate()
        process.wait(30)
        for parent in ("/run/systemd", "/run/log/journal", "/var/log/journal"):
            for path in Path(parent).glob(f"*.{name}"):
                shutil.rmtree(path)


def _entries(namespace: str, **match: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [
            *("journalctl", f"--namespace={namespace}", "-o", "json", "--all", "--no-pager"),
            *(f"{name}={value}" for name, value in match.items()),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_journald_stores_what_was_logged(journald: str) -> None:
    body = "LOG.warning('cannot', layer_digest='sha256:ä', error='two\\nlines')\n"
    body += "LOG.error('large', layer='x' * 3_000_000)"
    assert _logged(body, "info", "journal", f"/run/systemd/journal.{journald}/socket") == []
    wait_until(lambda: len(_entries(journald, SYSLOG_IDENTIFIER="lazysnap")) == 2)
    first, second = _entries(journald, SYSLOG_IDENTIFIER="lazysnap")
    assert first["MESSAGE"] == 'cannot layer-digest=sha256:ä error="two\\nlines"'
    assert first["LAZYSNAP_LAYER_DIGEST"] == "sha256:ä"
    assert first["LAZYSNAP_ERROR"] == "two\nlines"
    assert first["LAZYSNAP_LOGGER"] == "lazysnap.test"
    assert (first["PRIORITY"], second["PRIORITY"]) == ("4", "3")
    assert len(second["LAZYSNAP_LAYER"]) == 3_000_000


def test_without_journald_entries_go_to_standard_error(tmp_path: Path) -> None:
    (line,) = _logged("LOG.error('cannot')", "info", "journal", str(tmp_path / "none"))
    assert line.endswith("cannot")


def test_a_journald_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    body = """
import socket
hanging = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
hanging.bind(sys.argv[3])
for number in range(5000):
    LOG.info("said", number=number)
LOG.info("large", text="x" * 3_000_000)
hanging.setblocking(False)
taken = 0
try:
    while hanging.recv(1 << 16):
        taken += 1
except BlockingIOError:
    pass
LOG.info("at last")
lost, last = (hanging.recv(1 << 16).decode() for _ in range(2))
assert f"lost={5001 - taken}\\n" in lost, (taken, lost)
assert "MESSAGE=at last" in last
"""
    assert _logged(body, "info", "journal", path) == []


def test_the_journal_is_chosen_when_it_reads_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        status = Path(f"/proc/self/fd/{ours.fileno()}").stat()
        code = "from lazysnap import journal; raise SystemExit(not journal.is_standard_error())"
        for stream, chosen in ((f"{status.st_dev}:{status.st_ino}", True), ("1:1", False)):
            monkeypatch.setenv("JOURNAL_STREAM", stream)
            done = subprocess.run([sys.executable, "-c", code], stderr=ours, check=False)
            assert (done.returncode == 0) is chosen


def test_names_of_fields_are_such_as_journald_takes() -> None:
    assert journal.field_name("remote-snapshot-prepared") == "LAZYSNAP_REMOTE_SNAPSHOT_PREPARED"
    assert len(journal.field_name("x" * 100)) == 64
    assert journal.entry([("A", "1"), ("B", "x\ny")]) == b"A=1\nB\n\3\0\0\0\0\0\0\0x\ny\n"
