# SPDX-License-Identifier: Apache-2.0
"""What the store keeps, as values. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lazysnap import filters
from lazysnap.overlay import Kind

NO_LABELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot takes by itself.

    Args:
        size: bytes of disk blocks.
        inodes: files and directories, a file with several names counted once.
    """

    size: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as stored.

    Args:
        id: its number, also the name of its directory; stays the same at a commit.
        name: its key, or its name once committed.
        parent: name of the snapshot below; empty at the bottom.
        created_ns: nanoseconds since 1970.
        updated_ns: nanoseconds since 1970.
        usage: None while not known: it is active, or was not measured in time.
        labels: never with an empty value.
    """

    id: int
    name: str
    kind: Kind
    parent: str
    created_ns: int
    updated_ns: int
    usage: Usage | None
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)

    def field(self, path: filters.FieldPath) -> str | None:
        """The value at a field path of containerd's filters, None if absent."""
        match path:
            case ("name",):
                return self.name
            case ("parent",):
                return self.parent
            case ("kind",):
                return self.kind.name.lower()
            case ("labels", _, *_):
                return self.labels.get(".".join(path[1:]))
        return None


@dataclass(frozen=True, slots=True)
class Attachment:
    """What is served for a lazy snapshot.

    Args:
        slot: the layer's number in all shards, from `SnapshotStore.next_slot`.
        shard: number of the shard that serves it.
        layer_digest: digest of the compressed layer.
        record: what the shard must be told to serve it again.
    """

    slot: int
    shard: int
    layer_digest: str
    record: bytes


@dataclass(frozen=True, slots=True)
class Lineage:
    """A snapshot and everything below it.

    Args:
        snapshot: the snapshot.
        ancestors: the numbers of its ancestors, nearest first, without itself.
        attachments: the lazy ones among itself and its ancestors, by number, nearest first.
    """

    snapshot: Snapshot
    ancestors: tuple[int, ...]
    attachments: Mapping[int, Attachment]
