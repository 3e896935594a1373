# SPDX-License-Identifier: Apache-2.0
"""What `lazysnap pull` runs if the daemon does not pull. What a pull is stands in `lazysnap.pull`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazysnap.cli import interrupt, pulled
from lazysnap.containerd.client import Containerd
from lazysnap.platforms import Platform
from lazysnap.pull.delegated import image_of
from lazysnap.pull.progress import PullResult
from lazysnap.pull.puller import pull
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry


def run(
    documents: Mapping[str, Any] | None,
    reference: Reference,
    platform: Platform,
    *,
    address: str,
    namespace: str,
    snapshotter: str,
    plain_http: bool,
) -> PullResult:
    """Pull an image.

    Args:
        documents: what the daemon has told of the image, if there is a daemon.
        reference: of the image.
        platform: which of the image's platforms.
        address: containerd's socket.
        namespace: of containerd.
        snapshotter: its name in containerd's configuration.
        plain_http: speak HTTP without TLS to the registry.

    Raises:
        LazysnapError: the pull failed.
    """

    async def work() -> PullResult:
        async with Containerd(address, namespace) as containerd, Registry() as registry:
            if plain_http:
                registry.allow_plain_http(reference.host)
            image = None
            if documents is not None:
                image = await image_of(documents, reference, platform)
            with pulled.progress() as progress:
                return await pull(
                    reference, containerd, registry, snapshotter, platform, progress, image
                )

    return interrupt.run(work)
