# SPDX-License-Identifier: Apache-2.0
"""containerd's snapshots service as its clients see it: one snapshotter, one namespace.

Mounts are handed from Prepare to the diff service as they came; this module does not look into
them. Keys and names are containerd's: any text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.empty_pb2 import Empty

from lazysnap.containerd._pb import snapshots_pb2 as pb
from lazysnap.containerd._pb.types.mount_pb2 import Mount
from lazysnap.containerd.connection import Connection

_SERVICE = "containerd.services.snapshots.v1.Snapshots"
_PREPARE_SECONDS = 3600.0  # a remote snapshotter may get all of a layer meanwhile
_COMMIT_SECONDS = 600.0  # may sync a filesystem

Mounts = Sequence[Mount]
"""How to mount a snapshot; opaque to clients, which hand it on to the diff service."""

ACTIVE, VIEW, COMMITTED = pb.ACTIVE, pb.VIEW, pb.COMMITTED


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot as containerd tells it; `kind` is one of ACTIVE, VIEW, COMMITTED."""

    name: str
    parent: str
    kind: int
    labels: Mapping[str, str]


class Snapshots:
    """Client of the snapshots service for one snapshotter.

    Args:
        connection: an open connection.
        snapshotter: its name in containerd's configuration.
    """

    def __init__(self, connection: Connection, snapshotter: str) -> None:
        self._connection = connection
        self.snapshotter = snapshotter

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Mounts:
        """Make a writable snapshot.

        Returns:
            How to mount it.

        Raises:
            AlreadyExists: the key, or the remote snapshot that the labels ask for, exists.
            NotFound: the parent does not exist.
        """
        answer = await self._connection.unary(
            f"{_SERVICE}/Prepare",
            pb.PrepareSnapshotRequest(
                snapshotter=self.snapshotter, key=key, parent=parent, labels=labels
            ),
            pb.PrepareSnapshotResponse,
            what=f"prepare {key} with snapshotter {self.snapshotter}",
            timeout=_PREPARE_SECONDS,
        )
        return tuple(answer.mounts)

    async def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Make an active snapshot immutable under a new name.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: there is no such key.
        """
        await self._connection.unary(
            f"{_SERVICE}/Commit",
            pb.CommitSnapshotRequest(
                snapshotter=self.snapshotter, name=name, key=key, labels=labels
            ),
            Empty,
            what=f"commit {key}",
            timeout=_COMMIT_SECONDS,
        )

    async def stat(self, key: str) -> SnapshotInfo:
        """What is known of a snapshot.

        Raises:
            NotFound: there is none.
        """
        answer = await self._connection.unary(
            f"{_SERVICE}/Stat",
            pb.StatSnapshotRequest(snapshotter=self.snapshotter, key=key),
            pb.StatSnapshotResponse,
            what=f"snapshot {key}",
        )
        return _info(answer.info)

    async def remove(self, key: str) -> None:
        """Remove a snapshot; its space is freed by garbage collection.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it has children.
        """
        await self._connection.unary(
            f"{_SERVICE}/Remove",
            pb.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key),
            Empty,
            what=f"remove snapshot {key}",
        )

    async def walk(self, *filters: str) -> list[SnapshotInfo]:
        """All snapshots of the namespace that match one of the filters (containerd's syntax)."""
        answers = await self._connection.collect(
            f"{_SERVICE}/List",
            pb.ListSnapshotsRequest(snapshotter=self.snapshotter, filters=filters),
            pb.ListSnapshotsResponse,
            what=f"list of snapshots of {self.snapshotter}",
        )
        return [_info(info) for answer in answers for info in answer.info]


def _info(info: pb.Info) -> SnapshotInfo:
    return SnapshotInfo(info.name, info.parent, info.kind, dict(info.labels))
