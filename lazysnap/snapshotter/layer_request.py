# SPDX-License-Identifier: Apache-2.0
"""A request for the snapshot of a layer, and how the daemon answers it without the client.

containerd asks with the label `containerd.io/snapshot.ref`: the chain id of the layer. If a committed
snapshot of it is there, or can be made, Prepare answers that it exists, and containerd looks for it by its
parent and that label. Otherwise the client fills an ordinary snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazysnap.errors import NotFound
from lazysnap.labels import SNAPSHOT_REF
from lazysnap.overlay import Kind
from lazysnap.snapshotter.locks import DatabaseThread
from lazysnap.store.records import Lineage
from lazysnap.store.snapshots import SnapshotStore

NAME_TAKEN = "name-taken"
"""Reason: a snapshot has the name and is of another layer, or containerd would not find it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The snapshot of a layer is in the database, committed.

    Args:
        name: of the snapshot.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no snapshot of the layer; another way has to be taken.

    Args:
        reason: why, as a short code.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """A request for the snapshot of a layer.

    Args:
        parent: name of the snapshot below, or empty.
        below: the same, as it is in the database.
        labels: of the request; `containerd.io/snapshot.ref` is among them.
    """

    parent: str
    below: Lineage | None
    labels: Mapping[str, str]

    @property
    def ref(self) -> str:
        """The chain id of the layer and all below it."""
        return self.labels[SNAPSHOT_REF]

    @property
    def lower_ids(self) -> Sequence[int]:
        """The numbers of the snapshots below, nearest first."""
        return () if self.below is None else (self.below.snapshot.id, *self.below.ancestors)

    @property
    def parent_id(self) -> int | None:
        """The number of the snapshot below, if there is one."""
        return None if self.below is None else self.below.snapshot.id

    @property
    def name(self) -> str:
        """The name of the snapshot that answers this request."""
        return remote_name(self.ref, self.parent_id)

    def is_met_by(self, found: Lineage, *, remote: bool) -> bool:
        """Whether a snapshot answers this request, if it is of the layer that is asked for.

        That is certain of one that is not remote: its files were compared with the chain id.

        Args:
            found: the snapshot.
            remote: whether it has to be a remote one, or must not be one.
        """
        snapshot = found.snapshot
        return (
            snapshot.kind is Kind.COMMITTED
            and snapshot.parent == self.parent
            and snapshot.labels.get(SNAPSHOT_REF) == self.ref
            and (snapshot.id in found.attachments) == remote
        )


def remote_name(ref: str, parent_id: int | None) -> str:
    """The name of the snapshot of a layer.

    One chain id can be put on different parents: the lower layers of two namespaces may be ordinary
    snapshots with names of their own.

    Args:
        ref: the chain id.
        parent_id: number of the snapshot below, if there is one.
    """
    return f"{ref}@{parent_id or 0}"


async def find(
    request: LayerRequest, store: SnapshotStore, db_thread: DatabaseThread
) -> Lineage | None:
    """The snapshot with the name that the answer to a request has; None if there is none.

    Args:
        request: what is asked for; the caller holds its name.
        store: the database.
        db_thread: runs what uses the database.

    Raises:
        Internal: the database failed.
    """
    try:
        return await db_thread.run(store.lineage, request.name)
    except NotFound:
        return None
