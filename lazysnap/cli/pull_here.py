# SPDX-License-Identifier: Apache-2.0
"""What `lazysnap pull` runs if the daemon does not pull. `lazysnap.pull` has what a pull is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazysnap.cli import interrupt, pull_output
from lazysnap.containerd.client import Containerd
from lazysnap.platforms import Platform
from lazysnap.pull.daemon_server import image_of
from lazysnap.pull.progress import PullResult
from lazysnap.pull.puller import pull
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry


def run(
    documents: Mapping[str, Any] | None,
    reference: str,
    platform: str,
    *,
    address: str,
    namespace: str,
    snapshotter: str,
    plain_http: bool,
) -> PullResult:
    """Pull an image.

    Args:
        documents: what the daemon has told of the image, if there is a daemon.
        reference: of the image, as people type it.
        platform: which of the image's platforms, as people type it.
        address: containerd's socket.
        namespace: of containerd.
        snapshotter: its name in containerd's configuration.
        plain_http: speak HTTP without TLS to the registry.

    Raises:
        LazysnapError: the pull failed, or what is to be pulled is malformed.
    """
    image_name, wanted = Reference.parse(reference), Platform.parse(platform)

    async def work() -> PullResult:
        async with Containerd(address, namespace) as containerd, Registry() as registry:
            if plain_http:
                registry.allow_plain_http(image_name.host)
            image = None
            if documents is not None:
                image = await image_of(documents, image_name, wanted)
            with pull_output.progress() as progress:
                return await pull(
                    image_name,
                    containerd,
                    registry,
                    snapshotter,
                    wanted,
                    progress=progress,
                    image=image,
                )

    return interrupt.run(work)
