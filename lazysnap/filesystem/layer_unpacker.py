# SPDX-License-Identifier: Apache-2.0
"""Unpacks layers from registries into directories, if the daemon does that itself.

Implements `lazysnap.snapshotter.interfaces.Unpacker`. Knows which layers an image has and how each is
unpacked on this node. Knows nothing of snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from lazysnap import mounts, oci
from lazysnap.errors import NotLazy
from lazysnap.labels import parse_remote_request
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.snapshotter.interfaces import LayerBlob
from lazysnap.unpack.applier import Whiteouts
from lazysnap.unpack.applier_pool import ApplierPool
from lazysnap.unpack.process import Answer, Job

_KINDS = (oci.LayerKind.GZIP, oci.LayerKind.ZSTD, oci.LayerKind.UNCOMPRESSED)


class LayerUnpacker:
    """Downloads layers from registries and unpacks them; see `Unpacker`.

    Args:
        registry: client for manifests and blobs.
        appliers: processes that unpack.
        may_be_lazy: whether a layer with these annotations may be mounted lazily; by default none may.

    Attributes:
        whiteouts: the form in which whiteouts are written on this node.
    """

    def __init__(
        self,
        registry: Registry,
        appliers: ApplierPool,
        may_be_lazy: Callable[[Mapping[str, str]], bool] = lambda _: False,
    ) -> None:
        self._registry = registry
        self._appliers = appliers
        self._may_be_lazy = may_be_lazy
        privileged = mounts.overlay_facts().privileged
        self.whiteouts = Whiteouts.TRUSTED if privileged else Whiteouts.USER

    async def find(self, labels: Mapping[str, str]) -> LayerBlob:
        """The layer that a request asks for; see `Unpacker`."""
        request = parse_remote_request(labels)
        if request is None:
            raise NotLazy("the labels name no layer", reason="no-image-labels")
        reference = Reference.parse(request.reference)
        size, media_type = request.layer_size, request.media_type
        if size is None or media_type is None:
            if request.manifest_digest is None:
                raise NotLazy("the labels name no manifest", reason="no-image-labels")
            manifest = await self._registry.image_manifest(
                reference, request.manifest_digest, hurried=True
            )
            blob = manifest.layer(request.layer_digest)
            size, media_type = blob.size, blob.media_type
        if oci.layer_kind(media_type) not in _KINDS:
            raise NotLazy(f"a layer of type {media_type} is left to containerd", reason="encrypted")
        return LayerBlob(reference, request.layer_digest, size)

    async def above(self, labels: Mapping[str, str]) -> list[LayerBlob]:
        """The layers above that will be unpacked here, too; see `Unpacker`."""
        request = parse_remote_request(labels)
        if request is None or request.manifest_digest is None:
            return []
        reference = Reference.parse(request.reference)
        manifest = await self._registry.image_manifest(
            reference, request.manifest_digest, hurried=True
        )
        blobs = manifest.layers or ()
        numbers = [n for n, blob in enumerate(blobs) if blob.digest == request.layer_digest]
        found = {
            blob.digest: LayerBlob(reference, blob.digest, blob.size)
            for blob in (blobs[numbers[0] + 1 :] if numbers else ())
            if oci.layer_kind(blob.media_type) in _KINDS
            and not self._may_be_lazy(blob.annotations or {})
        }
        found.pop(request.layer_digest, None)
        return list(found.values())

    async def unpack(
        self, layer: LayerBlob, target: str, lowers: Sequence[str], *, alone: bool = False
    ) -> Answer:
        """Download a layer, check it and unpack it; see `Unpacker`."""
        disk = os.statvfs(target)
        job = Job(
            target=target,
            size=layer.size,
            digest=str(layer.digest),
            whiteouts=self.whiteouts,
            lowers=list(lowers),
            devices=self.whiteouts is not Whiteouts.USER,
            most_bytes=disk.f_bavail * disk.f_frsize,
            alone=alone,
        )
        stream = self._registry.stream_blob(layer.reference, layer.digest, layer.size, hurried=True)
        async with stream as blob:
            return await self._appliers.apply(job, blob)
