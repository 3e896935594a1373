# SPDX-License-Identifier: Apache-2.0
"""Which snapshots are the layers of which image, and who uses them; told by labels and parents.

A snapshot that is there because of a pull says its image in a label. Everything below it belongs to the
image, whatever its own label says, as layers are shared. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lazysnap.labels import (
    CRI_IMAGE_REF,
    CRI_LAYER_DIGEST,
    REASON,
    REMOTE,
    STARGZ_DIGEST,
    STARGZ_REFERENCE,
)
from lazysnap.layers.slots import SlotRecord
from lazysnap.overlay import Kind
from lazysnap.store.records import Snapshot


@dataclass(frozen=True)
class Layer:
    """One layer of an image.

    Attributes:
        snapshot: its name.
        digest: of the blob; empty if it is not known.
        slot: what serves it; 0 if it is not lazy.
        reason: why it is not lazy; empty if it is, or was never asked for.
        used_by: keys of the active snapshots and views that are above it.
    """

    snapshot: str
    digest: str
    slot: int
    reason: str
    used_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Image:
    """An image and its layers, bottom first."""

    reference: str
    layers: tuple[Layer, ...]


def images(
    snapshots: Sequence[Snapshot], records: Mapping[int, SlotRecord], slots: Mapping[int, int]
) -> tuple[list[Image], int]:
    """The images that snapshots belong to.

    Args:
        snapshots: all.
        records: of the slots, by number.
        slots: of the lazy snapshots, by the snapshot's number.

    Returns:
        Images by reference, and how many committed snapshots belong to none.
    """
    forest = _Forest(snapshots, records, slots)
    found = [
        Image(reference, tuple(forest.layer(each) for each in forest.chain(top)))
        for reference, top in forest.tops()
    ]
    shown = {layer.snapshot for image in found for layer in image.layers}
    committed = {each.name for each in snapshots if each.kind is Kind.COMMITTED}
    # What the database does not tell, as it cannot be read.
    known = set(slots.values())
    found += (
        Image(record.reference, (Layer("", record.layer_digest, record.slot, ""),))
        for record in records.values()
        if record.slot not in known
    )
    return sorted(found, key=lambda image: image.reference), len(committed - shown)


class _Forest:
    """Snapshots by their parents."""

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        records: Mapping[int, SlotRecord],
        slots: Mapping[int, int],
    ) -> None:
        self._records = records
        self._slots = slots
        self._by_name = {each.name: each for each in snapshots}
        self._children: dict[str, list[Snapshot]] = {}
        for each in snapshots:
            self._children.setdefault(each.parent, []).append(each)
        self._users: dict[str, set[str]] = {}
        for each in snapshots:
            if each.kind is not Kind.COMMITTED:
                for below in self.chain(each)[:-1]:
                    self._users.setdefault(below.name, set()).add(each.name)

    def chain(self, top: Snapshot) -> list[Snapshot]:
        """A snapshot and all below it, bottom first."""
        found = [top]
        while found[-1].parent in self._by_name:
            found.append(self._by_name[found[-1].parent])
        return found[::-1]

    def tops(self) -> Iterator[tuple[str, Snapshot]]:
        """The references that snapshots name, each with the uppermost that names it."""
        for each in self._by_name.values():
            reference = self._reference(each)
            if not reference:
                continue
            above = self._above(each)
            if not any(self._reference(child) == reference for child in above):
                yield reference, self._unnamed_above(each)

    def _above(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        waiting = list(self._children.get(snapshot.name, ()))
        while waiting:
            child = waiting.pop()
            yield child
            waiting += self._children.get(child.name, ())

    def _unnamed_above(self, snapshot: Snapshot) -> Snapshot:
        """The uppermost that a pull left on top of it without a name, as some clients do."""
        while True:
            unnamed = [
                child
                for child in self._children.get(snapshot.name, ())
                if child.kind is Kind.COMMITTED
                and REASON in child.labels
                and not self._reference(child)
            ]
            if len(unnamed) != 1:
                return snapshot
            snapshot = unnamed[0]

    def _record(self, snapshot: Snapshot) -> SlotRecord | None:
        return self._records.get(self._slots.get(snapshot.id, 0))

    def _reference(self, snapshot: Snapshot) -> str:
        if snapshot.kind is not Kind.COMMITTED:
            return ""
        labels = snapshot.labels
        record = self._record(snapshot)
        named = labels.get(CRI_IMAGE_REF) or labels.get(STARGZ_REFERENCE)
        return named or (record.reference if record else "")

    def layer(self, snapshot: Snapshot) -> Layer:
        """A snapshot as a layer."""
        labels = snapshot.labels
        record = self._record(snapshot)
        digest = labels.get(CRI_LAYER_DIGEST) or labels.get(STARGZ_DIGEST) or ""
        lazy = REMOTE in labels
        return Layer(
            snapshot.name,
            record.layer_digest if record else digest,
            self._slots.get(snapshot.id, 0),
            "" if lazy else labels.get(REASON, ""),
            tuple(sorted(self._users.get(snapshot.name, ()))),
        )
