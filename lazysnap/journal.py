# SPDX-License-Identifier: Apache-2.0
"""Sends log entries to journald by its native protocol, so that fields can be searched for.

Format facts: systemd.io/JOURNAL_NATIVE_PROTOCOL. An entry is a datagram of `NAME=value` lines; a value
with a newline is `NAME`, newline, its length in 8 bytes little-endian, the value, newline. An entry
that is too large for a datagram is sent as a sealed memfd.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable

SOCKET = "/run/systemd/journal/socket"
_MOST_NAME = 64
# For so long who logs waits for a journald that is busy; for one that hangs everybody would wait for ever.
_PATIENCE = struct.pack("@ll", 0, 500_000)  # struct timeval, see socket(7)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def is_standard_error() -> bool:
    """Whether journald reads our standard error (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def field_name(name: str) -> str:
    """What a field is called in the journal: capitals, digits and `_`, with a prefix of ours."""
    text = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    return f"LAZYSNAP_{text.upper()}"[:_MOST_NAME]


def entry(fields: Iterable[tuple[str, str]]) -> bytes:
    """The datagram for an entry; names must be such as journald takes."""
    parts = []
    for name, value in fields:
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            parts.append(b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data))
        else:
            parts.append(b"%s=%s\n" % (name.encode(), data))
    return b"".join(parts)


class Journal:
    """A connection to journald.

    Args:
        path: of its socket.
    """

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
        # Of the next call: not to wait again for what was waited for in vain.
        self._flags = 0

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()

    def send(self, fields: Iterable[tuple[str, str]]) -> None:
        """Store an entry.

        Raises:
            BlockingIOError: journald hangs; the entry is lost.
            OSError: journald is not there, or does not take it.
        """
        data = entry(fields)
        try:
            try:
                self._socket.sendto(data, self._flags, self._path)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                self._send_file(data)
        except BlockingIOError:
            self._flags = socket.MSG_DONTWAIT
            raise
        self._flags = 0

    def _send_file(self, data: bytes) -> None:
        fd = os.memfd_create("lazysnap-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(data)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))
            self._socket.sendmsg([], [rights], self._flags, self._path)
        finally:
            os.close(fd)
