# SPDX-License-Identifier: Apache-2.0
"""Facts that several probes need: who serves the root, and what it serves. Changes nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import trio

from lazysnap.check.finding import Context
from lazysnap.errors import LazysnapError
from lazysnap.layers.slots import SlotRecord, list_slots, read_slot

_CONNECT_SECONDS = 5.0
_UCRED = struct.Struct("iII")
SCRATCH = "check-"
"""Beginning of the names of our temporary directories in the root; our process id follows."""


class Daemon(msgspec.Struct, frozen=True):
    """What a daemon wrote about itself when it started."""

    pid: int
    version: str
    address: str


def running_daemon(context: Context) -> Daemon | None:
    """The daemon that serves the root now, if one does.

    Told by the lock file that its process has open. The lock itself is not tried, as a daemon that is
    just starting would take that for another daemon.
    """
    try:
        with open(context.paths.daemon_facts, "rb") as file:
            daemon = msgspec.json.decode(file.read(1 << 16), type=Daemon)
    except (OSError, msgspec.MsgspecError):
        return None
    return daemon if _has_open(daemon.pid, context.paths.lock) else None


def _has_open(pid: int, path: str) -> bool:
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            if os.readlink(f"{directory}/{name}") == path:
                return True
    return False


def runs(pid: int, *words: str) -> bool:
    """Whether a process lives and has all of these words on its command line."""
    return set(words) <= set(command_line(pid))


def command_line(pid: int) -> list[str]:
    """The command line of a process; empty if there is none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return []


def environment(context: Context) -> dict[str, str]:
    """The environment that credentials are looked up in: the daemon's, or ours if there is none."""
    daemon = running_daemon(context)
    if daemon is not None:
        with contextlib.suppress(OSError), open(f"/proc/{daemon.pid}/environ", "rb") as file:
            pairs = [os.fsdecode(pair).partition("=") for pair in file.read().split(b"\0") if pair]
            return {name: value for name, _, value in pairs}
    return dict(os.environ)


def slots(context: Context) -> tuple[list[SlotRecord], dict[int, str]]:
    """What the shards serve.

    Returns:
        The records, and by slot why the others cannot be read.
    """
    records, unreadable = [], {}
    for slot in list_slots(context.root):
        try:
            records.append(read_slot(context.root, slot))
        except LazysnapError as error:
            unreadable[slot] = str(error)
    return records, unreadable


@contextlib.contextmanager
def scratch(context: Context) -> Iterator[str]:
    """A temporary directory, on the root's file system if there is one."""
    parent = context.root if os.path.isdir(context.root) else None
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", dir=parent) as directory:
        yield directory


@dataclass(frozen=True, slots=True)
class Look:
    """What came of asking the server of a file system something.

    Attributes:
        answered: whether an answer came in time.
        problem: what is wrong; empty if nothing is.
    """

    answered: bool
    problem: str


async def ask_file_system(path: str, seconds: float) -> Look:
    """statfs(2) of a path, which FUSE always passes on, in a process that may be left behind.

    A process that waits for a request that its server has read and does not answer cannot be ended,
    not even by SIGKILL, and its parent hangs as well. So it is init's child, not ours: it is
    started through a shell that ends at once.

    Args:
        path: on the file system.
        seconds: how long to wait.
    """
    command = [
        "/bin/sh",
        "-c",
        '"$@" </dev/null 2>&1 &',
        "sh",
        "stat",
        "-f",
        "-c",
        "answered",
        path,
    ]
    with trio.move_on_after(seconds):
        process = await trio.to_thread.run_sync(
            lambda: subprocess.Popen(
                command, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
            )
        )
        assert process.stdout is not None
        with process.stdout:
            await trio.to_thread.run_sync(process.wait)  # the shell
            stream = trio.lowlevel.FdStream(os.dup(process.stdout.fileno()))
            output = b""
            async with stream:
                async for data in stream:
                    output += data
        text = output.decode(errors="replace").strip()
        return Look(True, "" if text == "answered" else text)
    return Look(False, f"no answer within {seconds:g} s")


def peer(path: str) -> int:
    """The process that listens at a unix socket (SO_PEERCRED, unix(7)).

    Raises:
        OSError: no process does, or it is in another process namespace.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_CONNECT_SECONDS)
        connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid: int = _UCRED.unpack(credentials)[0]
    if pid <= 0:
        raise OSError(f"the process that listens at {path} is in another process namespace")
    return pid
