# SPDX-License-Identifier: Apache-2.0
"""Forks a process for each connection that comes in on standard input, and watches over it.

Python takes much longer to start than a small job takes, and a fork of what has started takes a few
milliseconds. The parent sends one byte with one descriptor, a socket, on a socket that is our standard
input. The process that is forked for it has the socket as its standard input, and nothing else that is
open. When the parent closes its end of the socket, the process is killed; when the process ends, the
socket is closed. When standard input ends, all end. Knows nothing of what the processes do.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

_MOST_DESCRIPTORS = 1 << 16


class _Child:
    """A process that was forked, and the parent's connection to it."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.connection = connection
        self.pidfd = os.pidfd_open(pid)


def serve(work: Callable[[], None], ended: Callable[[int], bytes]) -> None:
    """Fork until standard input ends.

    Args:
        work: what a process does. It ends when this returns.
        ended: what to send in place of a process that did not end as it should, by the negative number
            of the signal that killed it, or the status that it ended with.
    """
    control = socket.socket(fileno=sys.stdin.fileno())
    poll = select.poll()
    poll.register(control, select.POLLIN)
    by_pidfd: dict[int, _Child] = {}
    by_connection: dict[int, _Child] = {}
    while True:
        fd, _ = poll.poll()[0]  # handling one may make another's descriptor mean something else
        if fd == control.fileno():
            child = _fork(control, work)
            if child is None:
                break
            by_pidfd[child.pidfd] = by_connection[child.connection.fileno()] = child
            poll.register(child.pidfd, select.POLLIN)
            poll.register(child.connection, 0)  # its end is always told
        elif fd in by_connection:
            poll.unregister(fd)
            os.kill(by_connection.pop(fd).pid, signal.SIGKILL)
        else:
            poll.unregister(fd)
            child = by_pidfd.pop(fd)
            if by_connection.pop(child.connection.fileno(), None):
                poll.unregister(child.connection)
            _reap(child, ended)
    for child in by_pidfd.values():
        os.kill(child.pid, signal.SIGKILL)


def _fork(control: socket.socket, work: Callable[[], None]) -> _Child | None:
    """A process for the next connection; None when no more will come."""
    data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not data or not descriptors:
        return None
    connection = socket.socket(fileno=descriptors[0])
    pid = os.fork()
    if pid == 0:
        _run(connection, work)
    return _Child(pid, connection)


def _run(connection: socket.socket, work: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        os.dup2(connection.fileno(), sys.stdin.fileno())
        # The connections of others must be seen to end.
        os.closerange(3, _MOST_DESCRIPTORS)
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _reap(child: _Child, ended: Callable[[int], bytes]) -> None:
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pidfd)
    with child.connection, contextlib.suppress(OSError):  # the parent has closed its end
        if code := os.waitstatus_to_exitcode(status):
            child.connection.send(ended(code), socket.MSG_DONTWAIT)
