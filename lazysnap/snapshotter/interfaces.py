# SPDX-License-Identifier: Apache-2.0
"""What the snapshotter needs from others: a file system of remote layers, and an unpacker of layers.

The snapshotter owns names, directories and the database. The file system owns what it serves for a slot
and the mounts at the mount points that it is told. The unpacker fills directories that it is told. Only
declarations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lazysnap.digest import Digest
from lazysnap.reference import Reference
from lazysnap.store.records import Attachment
from lazysnap.unpack.applier import Whiteouts
from lazysnap.unpack.process import Answer


@dataclass(frozen=True, slots=True)
class Attached:
    """A remote snapshot.

    Args:
        snapshot_id: its number.
        mountpoint: the directory at which its tree must be visible.
        attachment: what is served there.
    """

    snapshot_id: int
    mountpoint: str
    attachment: Attachment


@dataclass(frozen=True, slots=True)
class Lower:
    """A layer below one that is to be mounted.

    Args:
        directory: where its own tree is visible.
        attachment: what is served there, if it is lazy.
    """

    directory: str
    attachment: Attachment | None


class Filesystem(Protocol):
    """Mounts layers lazily."""

    async def restore(self, attached: Sequence[Attached]) -> None:
        """Bring back what was mounted before a restart, and forget every slot that is not named.

        Called once, before any other method. A layer that cannot be brought back is logged and left
        to `check`.

        Args:
            attached: all remote snapshots.
        """

    async def mount(
        self, slot: int, labels: Mapping[str, str], mountpoint: str, lowers: Sequence[Lower]
    ) -> Attachment:
        """Attach a layer, and make it visible if that can be done at once; otherwise `placed` does.

        Args:
            slot: a number that was never used before.
            labels: of the request; `containerd.io/snapshot.ref` is among them.
            mountpoint: an empty directory. A directory above it is renamed afterwards, which the
                kernel allows and which the mount follows.
            lowers: the layers below, nearest first; directories that this layer leaves out get their
                attributes from there.

        Returns:
            What the database is to keep; `attachment.slot` is `slot`.

        Raises:
            LazysnapError: this layer cannot be mounted lazily, `reason` says why. Nothing is left
                mounted or attached then, and when the call is cancelled.
        """

    async def serves(self, attachment: Attachment, labels: Mapping[str, str]) -> bool:
        """Whether a layer that is attached is the one that a request asks for.

        The name of a snapshot is no proof of that: it is made of what an image says of itself.

        Args:
            attachment: of a remote snapshot.
            labels: of the request.

        Raises:
            LazysnapError: that cannot be known.
        """
        ...

    def placed(self, attached: Attached) -> None:
        """The directory of a mounted layer has its final name: begin to make the layer visible there.

        Does nothing if the layer is visible. `check` waits until it is.

        Args:
            attached: the layer, with its mount point under the final name.
        """

    async def check(self, chain: Sequence[Attached]) -> None:
        """Make sure that layers can serve reads; repair what can be repaired.

        Args:
            chain: the remote snapshots among the ancestors of the one to be used, nearest first.

        Raises:
            Unavailable: a layer cannot serve.
        """

    async def lowerdirs(self, layers: Sequence[Lower]) -> Sequence[str]:
        """The directories that overlay is to have for layers.

        Args:
            layers: nearest first; those that are lazy have passed `check`.

        Returns:
            Uppermost first. One directory may show several layers.

        Raises:
            Internal: they cannot be made visible.
        """

    def starting(self, chain: Sequence[Attached]) -> None:
        """A container is about to start on these layers: learn what it reads, or fetch that ahead.

        Args:
            chain: as for `check`, which has passed.
        """

    async def unmount(self, attached: Attached) -> None:
        """Unmount and forget a layer; does not fail if the layer is not mounted or attached."""


class LayerBlob(NamedTuple):
    """The blob of a layer, with all that is needed to download it.

    Args:
        reference: of an image whose repository has the blob.
        digest: of the blob.
        size: of the blob, in bytes.
    """

    reference: Reference
    digest: Digest
    size: int


class Unpacker(Protocol):
    """Downloads layers from registries and unpacks them into directories."""

    @property
    def whiteouts(self) -> Whiteouts:
        """The form in which whiteouts are written on this node."""

    async def find(self, labels: Mapping[str, str]) -> LayerBlob:
        """The layer that a request asks for.

        Args:
            labels: of the request.

        Raises:
            NotLazy: the labels name no layer, or a layer that cannot be unpacked here; `reason` says why.
            LazysnapError: the manifest of its image cannot be fetched.
        """

    async def above(self, labels: Mapping[str, str]) -> Sequence[LayerBlob]:
        """The layers above the one that a request asks for which will be unpacked here, too.

        Args:
            labels: of the request.

        Returns:
            Those that are certainly not lazy, lowest first; none if the labels name no manifest.

        Raises:
            LazysnapError: the manifest cannot be fetched.
        """

    async def unpack(
        self, layer: LayerBlob, target: str, lowers: Sequence[str], *, alone: bool = False
    ) -> Answer:
        """Download a layer, check it and unpack it.

        Args:
            layer: from `find` or `above`.
            target: an empty directory.
            lowers: directories of the layers below, nearest first.
            alone: the layers below are not there yet, see `lazysnap.unpack.applier.Options`.

        Returns:
            What was unpacked.

        Raises:
            LazysnapError: it failed; what is in `target` then is of no use.
        """
