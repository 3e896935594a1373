# SPDX-License-Identifier: Apache-2.0
"""What is mounted, as the database has it: a view or active snapshot for each mount, with labels.

A mount is found again by its source, a name that no other mount has, also when a directory above it was
renamed or it was bound to a second place. All functions block.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lazysnap.mounts import MountPoint
from lazysnap.store.snapshots import SnapshotStore

_PREFIX = "lazysnap.mount."
_FIELDS = ("mountpoint", "reference", "manifest", "source", "namespace")


@dataclass(frozen=True)
class Record:
    """One mount.

    Attributes:
        mountpoint: where it was mounted.
        reference: of its image.
        manifest: digest of the image's manifest for its platform.
        source: what the kernel's list of mounts calls it.
        namespace: the mount namespace in which it was mounted.
    """

    mountpoint: str
    reference: str
    manifest: str
    source: str
    namespace: str

    @property
    def key(self) -> str:
        """The snapshot's key."""
        return f"mount {self.source}"

    def labels(self) -> dict[str, str]:
        """For the snapshot."""
        return {_PREFIX + name: getattr(self, name) for name in _FIELDS if getattr(self, name)}


def new_source() -> str:
    """A name for a mount."""
    return f"lazysnap-{secrets.token_hex(8)}"


def _record(labels: Mapping[str, str]) -> Record | None:
    if _PREFIX + "source" not in labels:
        return None
    return Record(**{name: labels.get(_PREFIX + name, "") for name in _FIELDS})


def records(store: SnapshotStore) -> list[Record]:
    """All mounts that there should be."""
    found = (_record(snapshot.labels) for snapshot in store.walk())
    return [record for record in found if record is not None]


def forget_unused(store: SnapshotStore, points: Iterable[MountPoint]) -> list[Record]:
    """Forget every mount that is no more, and every snapshot that no other needs.

    Only in the database: their directories, slots and mounts are garbage then.

    Args:
        store: of a root that nobody else uses now.
        points: the kernel's list of mounts.

    Returns:
        The mounts that there are.
    """
    sources = {point.source for point in points}
    every = {snapshot.name: snapshot for snapshot in store.walk()}
    alive = [
        record
        for record in (_record(snapshot.labels) for snapshot in every.values())
        if record is not None and record.source in sources
    ]
    needed: set[str] = set()
    for record in alive:
        name = record.key
        while name and name not in needed:
            needed.add(name)
            name = every[name].parent
    unneeded = {name: snapshot for name, snapshot in every.items() if name not in needed}
    while unneeded:
        parents = {snapshot.parent for snapshot in unneeded.values()}
        for name in [name for name in unneeded if name not in parents]:
            store.remove(name)
            del unneeded[name]
    return alive
