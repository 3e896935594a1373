# SPDX-License-Identifier: Apache-2.0
"""Layers that cannot be lazy, unpacked by the daemon itself (`eager = "direct"`).

The layer goes from the registry straight into a committed snapshot, and Prepare answers that it exists,
as for a lazy one: so containerd neither downloads nor keeps the blob. What was unpacked is checked
against the blob's digest, and against the chain id that the client asks for, which is made of the
parent's and of the layer's diff id (OCI image-spec, config.md). Whatever goes wrong leads to an ordinary
snapshot, which the client fills: it is never an error of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import trio

from lazysnap import log, mounts, oci
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, DigestMismatch, LazysnapError, NotFound, NotLazy
from lazysnap.labels import REASON, SNAPSHOT_REF, parse_remote_request
from lazysnap.overlay import Kind
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.snapshotter import trees
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.locks import KeyLocks, Turn
from lazysnap.store.records import Lineage
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.unpack.process import Answer, Job
from lazysnap.unpack.processes import Appliers

_log = log.get(__name__)
_KINDS = (oci.LayerKind.GZIP, oci.LayerKind.ZSTD, oci.LayerKind.UNCOMPRESSED)
_REGISTRY_FAILS = frozenset(
    {"registry-error", "registry-unreachable", "not-in-registry", "unauthorized"}
)
"""Why a layer is not lazy, when asking the registry again would only take time."""


class Layer(NamedTuple):
    """A layer of which all is known that is needed to get it."""

    reference: Reference
    digest: Digest
    size: int


class Streams:
    """Gets layers from registries and unpacks them.

    Args:
        registry: client for manifests and blobs.
        appliers: processes that unpack.
    """

    def __init__(self, registry: Registry, appliers: Appliers) -> None:
        self._registry = registry
        self._appliers = appliers

    async def find(self, labels: Mapping[str, str]) -> Layer:
        """The layer that labels ask for.

        Raises:
            NotLazy: they do not tell, or it is none that can be unpacked here.
            LazysnapError: its manifest cannot be had.
        """
        request = parse_remote_request(labels)
        if request is None:
            raise NotLazy("the labels name no layer", reason="no-image-labels")
        reference = Reference.parse(request.reference)
        size, media_type = request.layer_size, request.media_type
        if size is None or media_type is None:
            if request.manifest_digest is None:
                raise NotLazy("the labels name no manifest", reason="no-image-labels")
            _, data = await self._registry.manifest(reference, request.manifest_digest)
            blob = oci.parse_manifest(data).layer(request.layer_digest)
            size, media_type = blob.size, blob.media_type
        if oci.layer_kind(media_type) not in _KINDS:
            raise NotLazy(f"a layer of type {media_type} is left to containerd", reason="encrypted")
        return Layer(reference, request.layer_digest, size)

    async def unpack(self, layer: Layer, target: str, lowers: list[str]) -> Answer:
        """Get a layer and unpack it.

        Args:
            layer: which one.
            target: an empty directory.
            lowers: directories of the layers below, nearest first.

        Raises:
            LazysnapError: it failed.
        """
        user_namespace = mounts.overlay_facts().user_namespace
        disk = os.statvfs(target)
        job = Job(
            target=target,
            size=layer.size,
            digest=str(layer.digest),
            whiteouts="user" if user_namespace else "trusted",
            lowers=lowers,
            devices=not user_namespace,
            most_bytes=disk.f_bavail * disk.f_frsize,
        )
        stream = self._registry.stream_blob(layer.reference, layer.digest, layer.size)
        async with stream as blob:
            return await self._appliers.apply(job, blob)


class DirectLayers:
    """The snapshots of one root that the daemon fills itself.

    Args:
        directories: of the root.
        store: its database.
        in_turn: runs what uses the database.
        house: collects directories that come to nothing.
        streams: gets and unpacks layers.
        sync: wait until the disk has a layer before its snapshot is made.
    """

    def __init__(
        self,
        directories: Directories,
        store: SnapshotStore,
        in_turn: Turn,
        house: Housekeeping,
        streams: Streams,
        *,
        sync: bool,
    ) -> None:
        self._dirs = directories
        self._store = store
        self._in_turn = in_turn
        self._house = house
        self._streams = streams
        self._sync = sync
        self._names = KeyLocks()

    async def prepare(
        self, parent: str, below: Lineage | None, labels: Mapping[str, str], reason: str
    ) -> None:
        """Try to make a committed snapshot of a layer; returns if it is not possible.

        Args:
            parent: name of the snapshot below, or empty.
            below: the same, as it is in the database.
            labels: of the request.
            reason: why the layer is not lazy.

        Raises:
            AlreadyExists: it is there now.
            NotFound: the parent was removed meanwhile.
            Internal: the database failed.
        """
        ref = labels[SNAPSHOT_REF]
        name = f"{ref}@{0 if below is None else below.snapshot.id}"
        chain = "" if below is None else below.snapshot.labels.get(SNAPSHOT_REF)
        if chain is None or reason in _REGISTRY_FAILS:
            return
        async with self._names.hold(name):
            try:
                found = await self._in_turn(self._store.lineage, name)
            except NotFound:
                await self._make(name, parent, below, {**labels, REASON: reason}, chain)
                return
            snapshot = found.snapshot
            if (
                snapshot.kind is Kind.COMMITTED
                and snapshot.parent == parent
                and snapshot.labels.get(SNAPSHOT_REF) == ref
                and snapshot.id not in found.attachments
            ):
                raise AlreadyExists(f"snapshot {name!r} exists")

    async def _make(
        self,
        name: str,
        parent: str,
        below: Lineage | None,
        labels: Mapping[str, str],
        chain: str,
    ) -> None:
        numbers = () if below is None else (below.snapshot.id, *below.ancestors)
        parent_id = numbers[0] if numbers else None
        with self._house.building() as directory:

            def build() -> str:
                return self._dirs.build(directory, work=False, parent_id=parent_id)

            try:
                layer = await self._streams.find(labels)
                target = await trio.to_thread.run_sync(build)
                lowers = [self._dirs.fs(number) for number in numbers]
                answer = await self._streams.unpack(layer, target, lowers)
                _check_chain(layer, chain, answer.diff_id, labels[SNAPSHOT_REF])
                if self._sync:
                    await trio.to_thread.run_sync(mounts.sync_filesystem, target)
                usage = await trio.to_thread.run_sync(trees.measure, target)
            except LazysnapError as error:
                self._house.expect_garbage()
                _log.warning("a layer is left to containerd", name=name, error=error)
                return
            except Exception:
                self._house.expect_garbage()
                _log.exception("unpacking a layer failed")
                return

            def place() -> None:
                with self._store.committing(
                    name, parent, labels, usage, parent_id=parent_id
                ) as number:
                    self._dirs.place(directory, number)

            await self._in_turn(place)
        if answer.ignored_xattrs:
            _log.warning(
                "xattrs of a layer were left out", layer=layer.digest, xattrs=answer.examples
            )
        _log.info("a layer is unpacked", name=name, entries=answer.entries, bytes=answer.size)
        raise AlreadyExists(f"snapshot {name!r} is ready")


def _check_chain(layer: Layer, chain: str, diff_id: str, wanted: str) -> None:
    found = oci.chain_id(Digest.parse(chain) if chain else None, Digest.parse(diff_id))
    if found != wanted:
        raise DigestMismatch(
            f"layer {layer.digest} unpacks to {diff_id}, which makes {found} and not {wanted}"
        )
