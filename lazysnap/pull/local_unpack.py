# SPDX-License-Identifier: Apache-2.0
"""Unpacks a layer while it is downloaded, when the snapshot is a directory that we can reach.

containerd's diff service begins with a layer when all of it is in the content store. A client on the same
machine can do the same work meanwhile: write to the directory that Prepare has named, straight, as the
diff service would. The blob goes to the content store as ever. What this cannot or does not finish is left
to the diff service.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence

import trio

from lazysnap import log, oci
from lazysnap.containerd._pb.types.mount_pb2 import Mount
from lazysnap.errors import LazysnapError, Unavailable
from lazysnap.unpack.applier_pool import ApplierPool
from lazysnap.unpack.process import Answer, Job

_log = log.get(__name__)
_PIECES = 64  # of what the network gives at a time, at most 256 KiB
_SECONDS = 5.0
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7)
_KINDS = (oci.LayerKind.GZIP, oci.LayerKind.ZSTD, oci.LayerKind.UNCOMPRESSED)


class Tap:
    """The bytes of a download, for somebody who needs them as they come."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[bytes](_PIECES)

    async def give(self, piece: bytes) -> None:
        """Hand on bytes; waits when the other side is slow, and does nothing when it is gone."""
        try:
            await self._send.send(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    def end(self) -> None:
        """There are no more bytes, whether or not these were all."""
        self._send.close()

    def stop(self) -> None:
        """No more bytes are wanted."""
        self._receive.close()

    def pieces(self, size: int) -> Pieces:
        """The bytes; there must be `size` of them."""
        return Pieces(self._receive, size)


class Pieces:
    """The bytes of a tap, one piece after the other.

    A class, as a generator that is not read to its end would have to be closed by its reader.
    """

    def __init__(self, receive: trio.MemoryReceiveChannel[bytes], size: int) -> None:
        self._receive = receive
        self._left = size

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes.

        Raises:
            Unavailable: the download has ended before the blob.
        """
        try:
            piece = await self._receive.receive()
        except trio.EndOfChannel:
            if self._left:
                raise Unavailable("the download did not bring all of the layer") from None
            raise StopAsyncIteration from None
        self._left -= len(piece)
        return piece


class LocalLayer:
    """A layer that is being unpacked here.

    Args:
        blob: its descriptor.
        job: what the applier is told.
        tap: at its download.
        appliers: processes that unpack.
    """

    def __init__(self, blob: oci.Descriptor, job: Job, tap: Tap, appliers: ApplierPool) -> None:
        self._blob = blob
        self._job = job
        self._tap = tap
        self._appliers = appliers
        self._scope = trio.CancelScope()
        self._done = trio.Event()
        self._answer: Answer | None = None

    async def run(self) -> None:
        """Unpack; a failure is left to `result`."""
        try:
            with self._scope:
                pieces = self._tap.pieces(self._blob.size)
                self._answer = await self._appliers.apply(self._job, pieces)
        except LazysnapError as error:
            _log.debug("layer is left to the diff service", layer=self._blob.digest, error=error)
        finally:
            self._tap.stop()
            self._done.set()

    async def result(self) -> str | None:
        """The diff id when all is unpacked; None if it could not be."""
        await self._done.wait()
        return None if self._answer is None else self._answer.diff_id

    @property
    def target(self) -> str:
        """The directory that it is unpacked into."""
        return self._job.target

    @property
    def left_out(self) -> list[bytes]:
        """What the layers below are needed for, see `lazysnap.unpack.applier.inherit`."""
        return [] if self._answer is None else self._answer.left_out

    def spoiled(self) -> bool:
        """Whether something was left in the directory that is not the layer."""
        return self._answer is None and not is_empty(self._job.target)

    async def cancel(self) -> None:
        """Stop; nothing is written any more when this returns."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._done.wait()


def job_for(blob: oci.Descriptor, mounts: Sequence[Mount], address: str) -> Job | None:
    """How to unpack a layer into a snapshot from here; None if only containerd can.

    Args:
        blob: descriptor of the layer.
        mounts: what Prepare returned.
        address: path of containerd's socket.
    """
    if oci.layer_kind(blob.media_type) not in _KINDS or os.geteuid() != 0 or len(mounts) != 1:
        return None
    (mount,) = mounts
    lowers: list[str] = []
    if mount.type == "overlay":
        options = dict(option.partition("=")[::2] for option in mount.options)
        if "userxattr" in options or "upperdir" not in options or "lowerdir" not in options:
            return None
        target, whiteouts = options["upperdir"], "trusted"
        lowers = options["lowerdir"].split(":")
    elif mount.type == "bind" and "rw" in mount.options:
        target, whiteouts = mount.source, "remove"  # as the diff service does below all others
    else:
        return None
    if not is_empty(target) or not _is_beside(address):
        return None
    disk = os.statvfs(target)
    return Job(
        target=target,
        size=blob.size,
        digest=str(blob.digest),
        whiteouts=whiteouts,
        lowers=lowers,
        most_bytes=disk.f_bavail * disk.f_frsize,
    )


def is_empty(directory: str) -> bool:
    """Whether a directory can be read and has nothing in it."""
    try:
        return os.path.isabs(directory) and not os.listdir(directory)
    except OSError:
        return False


def _is_beside(address: str) -> bool:
    """Whether containerd sees the same directories under the same names as we do."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_SECONDS)
            probe.connect(address)
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(peer)
        places = [
            (f"/proc/{pid}/{name}", f"/proc/self/{name}") for name in ("ns/mnt", "ns/user", "root")
        ]
        return pid > 0 and all(os.readlink(one) == os.readlink(other) for one, other in places)
    except OSError:
        return False
