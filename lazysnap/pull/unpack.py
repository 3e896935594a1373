# SPDX-License-Identifier: Apache-2.0
"""The layers of an image into snapshots: each is offered to the snapshotter, and what it does not
mount lazily is downloaded and unpacked.

Follows containerd's unpacker (core/unpack/unpacker.go). Every layer is prepared, also one that may
be there, since only that lets the snapshotter see it and gives it to our lease. Invariant: whatever
happens, no active snapshot of ours stays.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from lazysnap import labels as names
from lazysnap import log, oci
from lazysnap.containerd.client import Containerd
from lazysnap.containerd.snapshots import Mounts, Snapshots
from lazysnap.digest import Digest
from lazysnap.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    InvalidArgument,
    LazysnapError,
    NotFound,
    NotLazy,
    Unavailable,
)
from lazysnap.pull.download import PARALLEL, Downloads
from lazysnap.pull.local_unpack import LocalLayer, job_for
from lazysnap.pull.metadata import Labeller
from lazysnap.pull.progress import LayerResult, LayerState, Progress
from lazysnap.pull.staging import StagedLayer, Staging
from lazysnap.registry.image import Image
from lazysnap.unpack.applier_pool import ApplierPool

_log = log.get(__name__)

_TRIES = 3
_CLEANUP_SECONDS = 10.0
_BUILTIN = frozenset(
    {"overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "aufs", "erofs"}
)
"""containerd's own snapshotters, which mount nothing lazily."""


@dataclass(frozen=True)
class Layer:
    """A layer with all that is needed to prepare it."""

    number: int
    blob: oci.Descriptor
    diff_id: Digest
    chain_id: Digest
    parent: str
    labels: dict[str, str]


def plan(image: Image) -> list[Layer]:
    """The layers of an image, lowest first."""
    blobs = image.manifest.layers or ()
    layers: list[Layer] = []
    parent = ""
    for number, (blob, diff_id, chain_id) in enumerate(
        zip(blobs, image.config.diff_ids, image.config.chain_ids(), strict=True)
    ):
        labels = image.layer_labels(number, chain_id)
        layer = Layer(number, blob, diff_id, chain_id, parent=parent, labels=labels)
        layers.append(layer)
        parent = chain_id
    return layers


def can_be_lazy(blob: oci.Descriptor) -> bool:
    """Whether a layer's description leaves it possible that a snapshotter mounts it lazily.

    A gzip layer needs the digest of its TOC in the manifest, or nothing of it could be verified.
    zstd layers of older writers have no annotations and can yet be zstd:chunked.
    """
    kind = oci.layer_kind(blob.media_type)
    if kind is oci.LayerKind.GZIP:
        return blob.annotation(oci.TOC_DIGEST) is not None
    return kind is oci.LayerKind.ZSTD


class Unpacker:
    """Unpacks the layers of one image.

    Args:
        containerd: with the pull's lease.
        snapshotter: name of the snapshotter.
        layers: all layers, lowest first.
        downloads: fetches what is not lazy.
        labeller: for the image's reference.
        progress: told about each layer.
        nursery: where layers are unpacked here.
        lazy_only: give up when a layer is neither lazy nor there.
    """

    def __init__(
        self,
        containerd: Containerd,
        snapshotter: str,
        layers: Sequence[Layer],
        *,
        downloads: Downloads,
        labeller: Labeller,
        progress: Progress,
        nursery: trio.Nursery,
        lazy_only: bool = False,
    ) -> None:
        self._nursery = nursery
        self._lazy_only = lazy_only
        self._containerd = containerd
        self._appliers = ApplierPool(PARALLEL)
        self._snapshots: Snapshots = containerd.snapshots(snapshotter)
        self._lazy_possible = snapshotter not in _BUILTIN
        self._layers = layers
        self._downloads = downloads
        self._labeller = labeller
        self._staging = Staging(
            self._snapshots,
            downloads,
            self._appliers,
            nursery,
            address=containerd.address,
            new_key=_new_key,
        )
        self._progress = progress
        self._results: list[LayerResult] = []
        # whether the snapshotter gets layers by itself is known from its first answer
        self._direct = False
        self._answered = trio.Event()
        self._turn = 0

    async def run(self) -> list[LayerResult]:
        """Bring all layers into snapshots.

        Raises:
            LazysnapError: a layer could not be had or unpacked.
        """
        if not self._lazy_only:
            self._start_certain()
        try:
            for layer in self._layers:
                self._turn = layer.number
                self._results.append(await self._layer(layer))
        finally:
            await self._staging.aclose()
        return self._results

    def _start_certain(self) -> None:
        """Begin to download the layers that no answer of the snapshotter could make lazy.

        They wait for its first answer, which may be that it unpacks such layers without us.
        """
        for layer in self._layers:
            if not (self._lazy_possible and can_be_lazy(layer.blob)):
                self._downloads.start(layer.number, layer.blob, self._absent(layer))

    def _absent(self, layer: Layer) -> Callable[[], Awaitable[bool]]:
        async def needed() -> bool:
            await self._answered.wait()
            if self._direct or not await _Absent(self._snapshots, layer.chain_id)():
                return False
            if layer.number > self._turn:
                await self._staging.begin(layer.number, layer.blob)
            return True

        return needed

    async def _layer(self, layer: Layer) -> LayerResult:
        self._progress.state(layer.number, LayerState.PREPARING)
        for _ in range(_TRIES):
            key = _new_key(layer.chain_id)
            try:
                result = await self._attempt(layer, key)
            except BaseException:
                await self._remove(key)  # also when Prepare was cancelled: it may have got through
                raise
            if result is not None:
                return result
        raise FailedPrecondition(
            f"snapshotter says that layer {layer.blob.digest} exists, and also that it does not",
            hint="another client may be removing this image; try again",
        )

    async def _attempt(self, layer: Layer, key: str) -> LayerResult | None:
        try:
            mounts = await self._snapshots.prepare(key, layer.parent, layer.labels)
        except AlreadyExists:
            state = await self._present(layer)
            return None if state is None else self._result(layer, state)
        except (InvalidArgument, Unavailable) as error:  # not loaded, or its socket is dead
            name = self._snapshots.snapshotter
            error.hint = (
                error.hint
                or f"is [proxy_plugins.{name}] in containerd's configuration, and {name} running?"
            )
            raise
        if self._lazy_only:
            raise NotLazy(f"layer {layer.blob.digest} is to be unpacked")
        return await self._unpack(layer, key, mounts)

    async def _present(self, layer: Layer) -> LayerState | None:
        try:
            info = await self._snapshots.stat(layer.chain_id)
        except NotFound:
            return None  # removed in between: prepare it anew
        self._note(info.labels)
        wanted = {other.blob.digest for other in self._layers[layer.number + 1 :]}
        if layer.blob.digest not in wanted:
            self._downloads.call_off(layer.blob.digest)
        return LayerState.LAZY if names.REMOTE in info.labels else LayerState.PRESENT

    async def _unpack(self, layer: Layer, key: str, mounts: Mounts) -> LayerResult | None:
        local = await self._begin_here(layer, mounts)
        try:
            reason = await self._reason(key)
            self._answered.set()
            _log.debug("layer is not lazy", layer=layer.blob.digest, reason=reason or "not told")
            await self._downloads.wait(layer.number, layer.blob)
            self._progress.state(layer.number, LayerState.UNPACKING)
            diff_id = None if local is None else await local.result()
        finally:
            if local is not None:
                await local.cancel()
        if diff_id is None:
            if local is not None and await trio.to_thread.run_sync(local.spoiled):
                await self._remove(key)
                return None  # the next snapshot is filled by the diff service alone
            diff_id = await self._containerd.apply(layer.blob, mounts)
        if diff_id != layer.diff_id:
            raise DigestMismatch(
                f"layer {layer.blob.digest} unpacks to {diff_id}, the image's configuration says"
                f" {layer.diff_id}",
                hint="the image is damaged: build and push it again",
            )
        try:
            await self._snapshots.commit(layer.chain_id, key, layer.labels)
        except AlreadyExists:  # another pull was quicker; its snapshot has the same content
            await self._remove(key)
        await self._labeller.uncompressed(layer.blob.digest, layer.diff_id)
        return self._result(layer, LayerState.UNPACKED, reason)

    async def _begin_here(self, layer: Layer, mounts: Mounts) -> LocalLayer | StagedLayer | None:
        """Unpack a layer while it is downloaded, if we can, and have begun or its download has not."""
        address = self._containerd.address
        job = await trio.to_thread.run_sync(job_for, layer.blob, mounts, address)
        if job is None:
            return None
        staged = self._staging.take(layer.number, job)
        if staged is not None:
            return staged
        tap = self._downloads.tap(layer.number, layer.blob)
        if tap is None:
            return None
        local = LocalLayer(layer.blob, job, tap, self._appliers)
        self._nursery.start_soon(local.run)
        return local

    async def _reason(self, key: str) -> str | None:
        if not self._lazy_possible:
            return None
        info = await self._snapshots.stat(key)
        self._note(info.labels)
        return info.labels.get(names.REASON)

    def _note(self, labels: Mapping[str, str]) -> None:
        self._direct = labels.get(names.EAGER) == "direct"
        self._answered.set()

    def _result(self, layer: Layer, state: LayerState, reason: str | None = None) -> LayerResult:
        self._progress.state(layer.number, state)
        return LayerResult(layer.blob.digest, layer.blob.size, state, reason)

    async def _remove(self, key: str) -> None:
        with (
            trio.move_on_after(_CLEANUP_SECONDS, shield=True),
            contextlib.suppress(LazysnapError),
        ):
            await self._snapshots.remove(key)


@dataclass(frozen=True)
class _Absent:
    """Asks whether a layer still has to be unpacked."""

    snapshots: Snapshots
    chain_id: str

    async def __call__(self) -> bool:
        try:
            await self.snapshots.stat(self.chain_id)
        except NotFound:
            return True
        return False


def _new_key(chain_id: str) -> str:
    # The form of containerd's unpacker, by which snapshotters may know what it is for.
    suffix = base64.urlsafe_b64encode(os.urandom(3)).decode()
    return f"extract-{time.time_ns() % 1_000_000_000}-{suffix} {chain_id}"
