# SPDX-License-Identifier: Apache-2.0
"""Runs probes side by side, and fixes what they found.

A probe that fails or hangs is a finding like any other, and keeps no other probe from its work.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import trio

from lazysnap.check.finding import Context, Finding, Level, Probe, unknown, warning
from lazysnap.errors import LazysnapError

_DEFECT = "this is a defect of lazysnap check: please report it with its detail"


async def run(context: Context, probes: Sequence[Probe]) -> list[Finding]:
    """Ask all questions at once.

    Args:
        context: what is to be checked.
        probes: the questions.

    Returns:
        Findings in the order of the probes: at least one of each, `ok` if it found nothing.
    """
    found: dict[str, list[Finding]] = {}

    async def one(probe: Probe) -> None:
        seen = await _look(context, probe) or [Finding(Level.OK, probe.title)]
        found[probe.id] = [replace(finding, id=probe.id) for finding in seen]

    async with trio.open_nursery() as nursery:
        for probe in probes:
            nursery.start_soon(one, probe)
    return [finding for probe in probes for finding in found[probe.id]]


async def _look(context: Context, probe: Probe) -> list[Finding]:
    with trio.move_on_after(probe.seconds):
        try:
            if inspect.iscoroutinefunction(probe.look):
                return list(await probe.look(context))
            look = cast(Callable[[Context], Iterable[Finding]], probe.look)
            # A thread that hangs is left behind; it ends with the process.
            return await trio.to_thread.run_sync(
                lambda: list(look(context)), abandon_on_cancel=True
            )
        except LazysnapError as error:
            return [unknown(error, error.hint)]
        except OSError as error:
            return [unknown(error, _os_hint(error))]
        except Exception as error:  # an edge: one defect must not hide what the others find
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{os.path.basename(where.filename)}:{where.lineno}"
            return [warning(f"the probe failed: {type(error).__name__}: {error}", at, _DEFECT)]
    return [
        warning(
            f"no answer within {probe.seconds:g} s",
            "the disk, a mount or another process hangs, or the machine is very busy",
            "see the other findings, and the kernel log (dmesg) for tasks that hang",
        )
    ]


def _os_hint(error: OSError) -> str:
    return "run this as root" if isinstance(error, PermissionError) else ""


def repair(context: Context, findings: Sequence[Finding]) -> list[Finding]:
    """Fix what can be fixed safely, and say what was done. Blocks.

    Args:
        context: what was checked.
        findings: what was found.

    Returns:
        The same findings: those that were fixed with `fixed`, others perhaps with another hint.
    """
    with _no_daemon(context) as offline:
        return [_repaired(finding, offline) for finding in findings]


def _repaired(finding: Finding, offline: bool) -> Finding:
    if finding.fix is None:
        return finding
    if finding.fix.offline and not offline:
        return replace(
            finding, hint="stop lazysnap serve, which may be using it, and run this again"
        )
    try:
        return replace(finding, fixed=finding.fix.action())
    except (LazysnapError, OSError) as error:
        return replace(finding, detail=f"{finding.detail} (cannot be fixed: {error})".strip())


@contextlib.contextmanager
def _no_daemon(context: Context) -> Iterator[bool]:
    """Keep a daemon from starting on the root; whether none is running."""
    try:
        fd = os.open(context.paths.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False  # never used by a daemon: there is nothing of lazysnap's to mend either
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 if there is nothing worse than information, 1 with warnings, 2 with failures."""
    levels = {finding.level for finding in findings if not finding.fixed}
    return 2 if Level.FAILURE in levels else 1 if Level.WARNING in levels else 0
