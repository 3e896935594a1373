# SPDX-License-Identifier: Apache-2.0
"""Layers that are unpacked before their turn, while they are downloaded.

containerd's snapshots are made one on top of the other, so the directory of a layer has no name before
all layers below it are committed. Until then a layer is unpacked into a snapshot of its own that has
no parent; in its turn its files are renamed into the directory that Prepare names. What a crash leaves
is an active snapshot of the pull's lease, and goes with that.

What this cannot do is left to others: it never fails a pull.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from lazysnap import log, oci
from lazysnap.containerd.snapshots import Snapshots
from lazysnap.errors import LazysnapError
from lazysnap.pull.download import Downloads
from lazysnap.pull.local_unpack import LocalLayer, is_empty, job_for
from lazysnap.unpack.applier import Whiteouts
from lazysnap.unpack.applier_pool import ApplierPool
from lazysnap.unpack.aside import bring
from lazysnap.unpack.process import Job

_log = log.get(__name__)
_CLEANUP_SECONDS = 10.0


class StagedLayer:
    """A layer that is unpacked aside, and the place where it belongs.

    Args:
        local: unpacks it.
        job: what would be done if it were unpacked where it belongs.
    """

    def __init__(self, local: LocalLayer, job: Job) -> None:
        self._local = local
        self._job = job

    async def result(self) -> str | None:
        """The diff id when the layer is in its place; None if it could not be brought there."""
        diff_id = await self._local.result()
        if diff_id is None:
            return None
        try:
            await trio.to_thread.run_sync(self._move)
        except LazysnapError as error:
            _log.warning("layer is left to the diff service", layer=self._job.digest, error=error)
            return None
        return diff_id

    def _move(self) -> None:
        bring(
            self._local.target,
            self._job.target,
            lowers=self._job.lowers,
            left_out=self._local.left_out,
            whiteouts=Whiteouts.TRUSTED,
        )

    def spoiled(self) -> bool:
        """Whether something is in its place that may not be all of the layer."""
        return not is_empty(self._job.target)

    async def cancel(self) -> None:
        """Stop; nothing is written any more when this returns."""
        await self._local.cancel()


class Staging:
    """The layers of one pull that are unpacked before their turn.

    Args:
        snapshots: with the pull's lease.
        downloads: of the pull.
        appliers: processes that unpack.
        nursery: where layers are unpacked.
        address: path of containerd's socket.
        new_key: makes keys for snapshots.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        downloads: Downloads,
        appliers: ApplierPool,
        nursery: trio.Nursery,
        *,
        address: str,
        new_key: Callable[[str], str],
    ) -> None:
        self._snapshots = snapshots
        self._downloads = downloads
        self._appliers = appliers
        self._nursery = nursery
        self._address = address
        self._new_key = new_key
        self._keys: list[str] = []
        self._layers: dict[int, LocalLayer] = {}
        # Only where layers are directories of their own; native copies what is below into each.
        self._possible = snapshots.snapshotter != "native"

    async def begin(self, layer: int, blob: oci.Descriptor) -> None:
        """Unpack a layer while it is downloaded, if that is possible.

        Args:
            layer: its number.
            blob: its descriptor; its download has not begun.
        """
        if not self._possible:
            return
        key = self._new_key(f"staged {blob.digest}")
        self._keys.append(key)
        try:
            mounts = await self._snapshots.prepare(key, "", {})
        except LazysnapError as error:
            _log.debug("layer is not unpacked ahead", layer=blob.digest, error=error)
            return
        job = await trio.to_thread.run_sync(job_for, blob, mounts, self._address)
        if job is None:
            self._possible = False  # nor will it be for the others
            return
        job.whiteouts, job.alone = Whiteouts.TRUSTED, True
        tap = self._downloads.tap(layer, blob)
        if tap is not None:
            self._layers[layer] = LocalLayer(blob, job, tap, self._appliers)
            self._nursery.start_soon(self._layers[layer].run)

    def take(self, layer: int, job: Job) -> StagedLayer | None:
        """A layer whose turn it is; None if it is not unpacked here.

        Args:
            layer: its number.
            job: how it would be unpacked where it belongs.
        """
        if job.whiteouts != Whiteouts.TRUSTED or layer not in self._layers:
            return None
        return StagedLayer(self._layers.pop(layer), job)

    async def aclose(self) -> None:
        """Stop what nobody has taken, and remove the snapshots."""
        for local in self._layers.values():
            await local.cancel()
        with trio.move_on_after(_CLEANUP_SECONDS, shield=True):
            for key in self._keys:
                with contextlib.suppress(LazysnapError):
                    await self._snapshots.remove(key)
