# SPDX-License-Identifier: Apache-2.0
"""Probes that fail, hang, or find something; and what is mended."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from lazysnap.check.everything import PROBES
from lazysnap.check.finding import Context, Finding, Fix, Level, Probe, failure, info, warning
from lazysnap.check.running import exit_code, repair, run
from lazysnap.errors import Internal
from tests.check.scene import Scene, context


def _nothing(_: Context) -> list[Finding]:
    return []


async def test_a_probe_that_fails_is_a_finding_and_stops_no_other(tmp_path: Path) -> None:
    def crash(_: Context) -> Iterator[Finding]:
        yield failure("found before")
        raise KeyError("oops")

    async def crash_in_a_nursery(_: Context) -> list[Finding]:
        async with trio.open_nursery():
            raise ZeroDivisionError

    def refuse(_: Context) -> list[Finding]:
        raise Internal("the disk is gone", hint="buy one")

    def forbidden(_: Context) -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/x")

    def fail(_: Context) -> list[Finding]:
        raise OSError(5, "Input/output error", "/x")

    looks = {"a": crash, "b": crash_in_a_nursery, "c": refuse, "d": forbidden, "e": fail}
    looks["f"] = _nothing
    probes = [Probe(name, f"title of {name}", look) for name, look in looks.items()]
    found = await run(context(tmp_path), probes)
    assert [finding.id for finding in found] == list(looks)
    assert [finding.level for finding in found] == [Level.WARNING] * 5 + [Level.OK]
    assert "KeyError" in found[0].summary
    assert "test_running.py" in found[0].detail
    assert "disk is gone" in found[2].summary
    assert found[2].hint == "buy one"
    assert "root" in found[3].hint
    assert "dmesg" in found[4].hint
    assert found[5].summary == "title of f"


async def test_a_probe_that_hangs_is_left_behind(tmp_path: Path) -> None:
    ended = threading.Event()

    def hang(_: Context) -> list[Finding]:
        ended.wait(60)
        return []

    async def wait(_: Context) -> list[Finding]:
        await trio.sleep_forever()
        raise AssertionError

    probes = [
        Probe("blocks", "", hang, seconds=0.1),
        Probe("waits", "", wait, seconds=0.1),
        Probe("answers", "", _nothing),
    ]
    try:
        found = await run(context(tmp_path), probes)
    finally:
        ended.set()
    assert [finding.level for finding in found] == [Level.WARNING, Level.WARNING, Level.OK]
    assert "0.1 s" in found[0].summary


def test_exit_codes() -> None:
    fixed = replace(failure("a"), fixed="done")
    assert exit_code([]) == 0
    assert exit_code([info("a"), Finding(Level.OK, "b"), fixed]) == 0
    assert exit_code([warning("a"), info("b")]) == 1
    assert exit_code([warning("a"), failure("b")]) == 2


@pytest.mark.parametrize("serving", [False, True])
def test_what_a_daemon_uses_is_mended_only_without_one(tmp_path: Path, serving: bool) -> None:
    scene = Scene(tmp_path)
    done: list[str] = []

    def mend(name: str) -> Fix:
        return Fix(lambda: done.append(name) or f"mended {name}", offline=name == "offline")

    def fail() -> str:
        raise OSError(5, "Input/output error")

    findings = [
        warning("a", fix=mend("always")),
        warning("b", fix=mend("offline")),
        warning("c", fix=Fix(fail, offline=False)),
        warning("d", hint="by hand"),
    ]
    lock = os.open(scene.root / "lock", os.O_RDWR)
    try:
        if serving:
            fcntl.flock(lock, fcntl.LOCK_EX)
        after = repair(scene.context, findings)
        # and the lock is free again
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)
    assert done == (["always"] if serving else ["always", "offline"])
    assert [bool(finding.fixed) for finding in after] == [True, not serving, False, False]
    assert ("stop lazysnap serve" in after[1].hint) == serving
    assert "Input/output error" in after[2].detail
    assert after[3] == findings[3]


def test_all_probes_have_names_of_their_own() -> None:
    names = [probe.id for probe in PROBES]
    assert len(set(names)) == len(names)
    assert all(probe.title for probe in PROBES)
