# SPDX-License-Identifier: Apache-2.0
"""The pull of one image, from reference to image record.

Order, so that nothing is ever unprotected from garbage collection: lease, documents and snapshots, the
label on the configuration that holds the snapshots, image record, end of the lease. When a pull
fails or is cancelled, nothing of it stays.
"""

from __future__ import annotations

import trio

from lazysnap.containerd.client import Containerd
from lazysnap.errors import LazysnapError
from lazysnap.platforms import Platform
from lazysnap.pull import metadata
from lazysnap.pull.download import Downloads
from lazysnap.pull.progress import LayerResult, Progress, PullResult
from lazysnap.pull.unpack import Layer, Unpacker, plan
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.image import Image


async def pull(
    reference: Reference,
    containerd: Containerd,
    registry: Registry,
    snapshotter: str,
    platform: Platform,
    *,
    progress: Progress | None = None,
    image: Image | None = None,
    lazy_only: bool = False,
) -> PullResult:
    """Pull an image; layers that the snapshotter mounts lazily are not downloaded.

    Args:
        reference: of the image.
        containerd: a connection, in the namespace to pull into.
        registry: a client.
        snapshotter: name of the snapshotter in containerd's configuration.
        platform: which of the image's platforms.
        progress: receives events.
        image: what the reference points to, if that is known already.
        lazy_only: give up when a layer would have to be downloaded.

    Raises:
        RegistryError: the registry does not have it, refuses it, or cannot be reached.
        NotLazy: a layer would have to be downloaded, and `lazy_only` forbids it.
        LazysnapError: containerd or the snapshotter failed, or the image is malformed.
    """
    progress = progress or Progress()
    image = image or await registry.fetch_image(reference, platform)
    layers = plan(image)
    progress.resolved([layer.blob for layer in layers])
    async with containerd.lease() as leased:
        results, received = await _contents(
            leased,
            registry,
            image,
            layers,
            snapshotter=snapshotter,
            progress=progress,
            lazy_only=lazy_only,
        )
        if layers:
            labels = {f"containerd.io/gc.ref.snapshot.{snapshotter}": layers[-1].chain_id}
            await leased.content.set_labels(image.manifest.config.digest, labels)
        await leased.set_image(reference.name, image.top)
    return PullResult(
        reference.name, image.top.digest, image.descriptor.digest, tuple(results), received
    )


async def _contents(
    containerd: Containerd,
    registry: Registry,
    image: Image,
    layers: list[Layer],
    *,
    snapshotter: str,
    progress: Progress,
    lazy_only: bool,
) -> tuple[list[LayerResult], int]:
    """Bring documents and layers into containerd; neither waits for the other."""
    failures: list[LazysnapError] = []  # raised outside, where they are not wrapped into a group
    results: list[LayerResult] = []
    stored = trio.Event()
    labeller = metadata.Labeller(containerd.content, image.reference)

    async def store() -> None:
        try:
            await metadata.store(containerd.content, image, labeller)
        except LazysnapError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()
        stored.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store)
        content = containerd.content
        downloads = Downloads(
            nursery, content, registry, image.reference, labeller=labeller, progress=progress
        )
        unpacker = Unpacker(
            containerd,
            snapshotter,
            layers,
            downloads=downloads,
            labeller=labeller,
            progress=progress,
            nursery=nursery,
            lazy_only=lazy_only,
        )
        try:
            results = await unpacker.run()
            await stored.wait()
        except LazysnapError as error:
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    return results, downloads.bytes_received
