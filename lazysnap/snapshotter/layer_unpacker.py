# SPDX-License-Identifier: Apache-2.0
"""Layers from registries into directories, for the daemon that unpacks them itself.

Knows which layers there are and how each is unpacked on this node; nothing of snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lazysnap import mounts, oci
from lazysnap.digest import Digest
from lazysnap.errors import NotLazy
from lazysnap.labels import parse_remote_request
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.unpack.applier import Whiteouts
from lazysnap.unpack.applier_pool import Appliers
from lazysnap.unpack.process import Answer, Job

_KINDS = (oci.LayerKind.GZIP, oci.LayerKind.ZSTD, oci.LayerKind.UNCOMPRESSED)
_MANIFESTS = 64


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
        may_be_lazy: whether a layer with these annotations may be mounted lazily; if not told, none.

    Attributes:
        whiteouts: what becomes of them on this node.
    """

    def __init__(
        self,
        registry: Registry,
        appliers: Appliers,
        may_be_lazy: Callable[[Mapping[str, str]], bool] = lambda _: False,
    ) -> None:
        self._registry = registry
        self._appliers = appliers
        self._may_be_lazy = may_be_lazy
        self._manifests: dict[Digest, oci.Manifest] = {}
        privileged = mounts.overlay_facts().privileged
        self.whiteouts = Whiteouts.TRUSTED if privileged else Whiteouts.USER

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
            manifest = await self._manifest(reference, request.manifest_digest)
            blob = manifest.layer(request.layer_digest)
            size, media_type = blob.size, blob.media_type
        if oci.layer_kind(media_type) not in _KINDS:
            raise NotLazy(f"a layer of type {media_type} is left to containerd", reason="encrypted")
        return Layer(reference, request.layer_digest, size)

    async def above(self, labels: Mapping[str, str]) -> list[Layer]:
        """The layers above the one that labels ask for which will be unpacked here, too.

        Returns:
            Those that are certainly not lazy, lowest first; none if the labels name no manifest.

        Raises:
            LazysnapError: the manifest cannot be had.
        """
        request = parse_remote_request(labels)
        if request is None or request.manifest_digest is None:
            return []
        reference = Reference.parse(request.reference)
        blobs = (await self._manifest(reference, request.manifest_digest)).layers or ()
        numbers = [n for n, blob in enumerate(blobs) if blob.digest == request.layer_digest]
        found = {
            blob.digest: Layer(reference, blob.digest, blob.size)
            for blob in (blobs[numbers[0] + 1 :] if numbers else ())
            if oci.layer_kind(blob.media_type) in _KINDS
            and not self._may_be_lazy(blob.annotations or {})
        }
        found.pop(request.layer_digest, None)
        return list(found.values())

    async def _manifest(self, reference: Reference, digest: Digest) -> oci.Manifest:
        manifest = self._manifests.get(digest)
        if manifest is None:
            _, data = await self._registry.manifest(reference, digest)
            manifest = oci.parse_manifest(data)
            if len(self._manifests) >= _MANIFESTS:
                self._manifests.clear()
            self._manifests[digest] = manifest
        return manifest

    async def unpack(
        self, layer: Layer, target: str, lowers: list[str], *, alone: bool = False
    ) -> Answer:
        """Get a layer and unpack it.

        Args:
            layer: which one.
            target: an empty directory.
            lowers: directories of the layers below, nearest first.
            alone: they are not there yet, see `lazysnap.unpack.applier.Options`.

        Raises:
            LazysnapError: it failed.
        """
        disk = os.statvfs(target)
        job = Job(
            target=target,
            size=layer.size,
            digest=str(layer.digest),
            whiteouts=self.whiteouts,
            lowers=lowers,
            devices=self.whiteouts is not Whiteouts.USER,
            most_bytes=disk.f_bavail * disk.f_frsize,
            alone=alone,
        )
        stream = self._registry.stream_blob(layer.reference, layer.digest, layer.size)
        async with stream as blob:
            return await self._appliers.apply(job, blob)
