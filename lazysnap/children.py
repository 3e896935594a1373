# SPDX-License-Identifier: Apache-2.0
"""Processes that the daemon gives jobs to, by their standard input and output."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import trio

from lazysnap.errors import Internal


async def start(command: Sequence[str], purpose: str) -> trio.Process:
    """Start a process; whoever does is to `end` it.

    Args:
        command: its program and arguments.
        purpose: for the message when it does not start, such as "to unpack a layer".

    Raises:
        Internal: it cannot be started.
    """
    try:
        return await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What is sent to the daemon's group is not for it, and its directory may go away.
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        raise Internal(f"no process can be started {purpose}: {error}") from error


async def end(process: trio.Process) -> None:
    """End a process, if it has not, and close its pipes."""
    if process.poll() is None:
        process.kill()
    await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()
