# SPDX-License-Identifier: Apache-2.0
"""What a pull tells while it runs, and what it returns. Knows no terminal and no containerd."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from lazysnap.digest import Digest
from lazysnap.oci import Descriptor


class LayerState(enum.StrEnum):
    """Where a layer is on its way; the last three are ends."""

    WAITING = "waiting"
    PREPARING = "preparing"
    DOWNLOADING = "downloading"
    UNPACKING = "unpacking"
    UNPACKED = "unpacked"
    PRESENT = "present"
    """Unpacked by an earlier or a concurrent pull."""
    LAZY = "lazy"


class Progress:
    """Receives the events of a pull; this one ignores them. Calls must be quick."""

    def resolved(self, layers: Sequence[Descriptor]) -> None:
        """The manifest is known; layers are numbered from 0, the lowest."""

    def state(self, layer: int, state: LayerState) -> None:
        """A layer has come to a state."""

    def received(self, layer: int, offset: int) -> None:
        """So many bytes of a layer's blob are in containerd's content store."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What became of a layer.

    Attributes:
        digest: of its blob.
        size: of its blob in bytes.
        state: LAZY, PRESENT or UNPACKED.
        reason: why it is not lazy, if the snapshotter told (lazysnap.errors' reason codes).
    """

    digest: Digest
    size: int
    state: LayerState
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull did.

    Attributes:
        reference: name of the image in containerd.
        digest: of the index or manifest that the name points to.
        manifest: digest of the platform's manifest.
        layers: lowest first.
        bytes_downloaded: bytes of layers that were fetched; metadata not counted.
    """

    reference: str
    digest: Digest
    manifest: Digest
    layers: tuple[LayerResult, ...]
    bytes_downloaded: int

    @property
    def lazy_layers(self) -> int:
        """Number of layers that are mounted lazily."""
        return sum(layer.state is LayerState.LAZY for layer in self.layers)
