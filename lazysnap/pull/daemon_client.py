# SPDX-License-Identifier: Apache-2.0
"""Follows the daemon of this node while it pulls an image, which it can if all of its layers are lazy.

`daemon_ask` has asked it, and `daemon_server` is what it runs. Nothing that a pull needs is loaded here.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from typing import Any

from lazysnap import frames
from lazysnap.digest import Digest
from lazysnap.errors import Unavailable
from lazysnap.oci import Descriptor
from lazysnap.pull.progress import LayerResult, LayerState, Progress, PullResult

_RESOLVE_SECONDS = 10.0
# After a signal, for what the daemon has to take back.
_END_SECONDS = 15.0


class Delegation:
    """A pull that the daemon was asked to do.

    Args:
        connection: on which it was asked, see `daemon_ask.ask`; is closed by `follow`.

    Attributes:
        documents: of the image, as soon as the daemon has told them: see `pack_documents`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.documents: Mapping[str, Any] | None = None
        self._connection = connection

    def follow(self, progress: Progress) -> PullResult:
        """Wait until the image is pulled. Whatever ends that, also a signal, ends the pull.

        Args:
            progress: receives events.

        Raises:
            LazysnapError: the daemon cannot pull it: it may lack a password that the caller has, or a
                layer is not lazy. Nothing of the pull is left then.
        """
        with self._connection as connection:
            connection.settimeout(_RESOLVE_SECONDS)
            try:
                while True:
                    message = self._receive()
                    if "ok" in message:
                        return unpack_result(message["ok"])
                    if "error" in message:
                        raise frames.unpack_error(message["error"])
                    self._take(message, progress)
            except (OSError, LookupError, TypeError, ValueError) as error:
                raise Unavailable(f"the daemon does not pull: {error!r}") from error
            finally:
                self._hang_up()

    def _take(self, message: Mapping[str, Any], progress: Progress) -> None:
        if "documents" in message:
            self.documents = message
        elif "layers" in message:
            progress.resolved([Descriptor(*layer) for layer in message["layers"]])
            # containerd's calls have time limits of their own.
            self._connection.settimeout(None)
        else:
            progress.state(message["layer"], LayerState(message["state"]))

    def _receive(self) -> dict[str, Any]:
        return frames.unpack(self._exactly(frames.length(self._exactly(frames.LENGTH.size))))

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self._connection.recv(min(count - len(data), 1 << 18))
            if not more:
                raise Unavailable("the daemon hung up")
            data += more
        return bytes(data)

    def _hang_up(self) -> None:
        """Tell the daemon that nobody waits any more, and wait until it has cleaned up."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(_END_SECONDS)
            while self._connection.recv(1 << 16):
                pass


def pack_result(result: PullResult) -> dict[str, Any]:
    """What a pull did, as a message."""
    return {
        "reference": result.reference,
        "digest": result.digest,
        "manifest": result.manifest,
        "layers": [[each.digest, each.size, each.state, each.reason] for each in result.layers],
        "bytes": result.bytes_downloaded,
    }


def unpack_result(message: Mapping[str, Any]) -> PullResult:
    """What `pack_result` made a message of.

    Raises:
        FormatError: it is not such a message; as well as LookupError, TypeError and ValueError.
    """
    layers = tuple(
        LayerResult(Digest.parse(digest), size, LayerState(state), reason)
        for digest, size, state, reason in message["layers"]
    )
    return PullResult(
        message["reference"],
        Digest.parse(message["digest"]),
        Digest.parse(message["manifest"]),
        layers,
        message["bytes"],
    )
