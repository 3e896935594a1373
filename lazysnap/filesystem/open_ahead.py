# SPDX-License-Identifier: Apache-2.0
"""Opens layers before the client asks for them.

containerd asks for one layer after the other, and each would wait for its table of contents. So all layers
of an image are opened together when the first of them is asked for, as its labels name the others. With
`lazysnap pull`, which names the image as soon as it is started, they are opened even earlier. Nothing
depends on it: a layer that was not opened ahead is opened when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from lazysnap import log, oci
from lazysnap.advice import advice
from lazysnap.digest import Digest
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.labels import RemoteRequest
from lazysnap.layers.host_turns import HostTurns
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.image import Image

_log = log.get(__name__)
# The layers of one pull ask once; an image that is pulled again may have been removed in between.
_AGAIN_SECONDS = 60.0
_AT_ONCE = 16
_AT_ONCE_OF_HOST = 4


class OpenAhead:
    """Opens the layers of images before they are asked for.

    Args:
        registry: client.
        opener: of layers.
        finder: of profiles in the registry.
        nursery: where the tasks run that open layers.
        opened: called with each layer that is opened here, as soon as its index is on disk.
    """

    def __init__(
        self,
        registry: Registry,
        opener: Opener,
        finder: ProfileFinder,
        nursery: trio.Nursery,
        opened: Callable[[LayerSource, OpenedLayer], None] | None = None,
    ) -> None:
        self._registry = registry
        self._opener = opener
        self._finder = finder
        self._nursery = nursery
        self._opened = opened
        self._begun: dict[Digest, float] = {}
        self._turns = HostTurns(each=_AT_ONCE_OF_HOST, total=_AT_ONCE)

    async def image(self, reference: Reference, platform: Platform) -> Image:
        """Resolve an image that will be pulled, and begin to open its layers.

        Args:
            reference: of the image.
            platform: which of the image's platforms.

        Raises:
            LazysnapError: it cannot be resolved; the client may still try.
        """

        def resolved(descriptor: oci.Descriptor, manifest: oci.Manifest) -> None:
            self._nursery.start_soon(self._finder.look, reference, descriptor.digest)
            if self._first_time(descriptor.digest):
                self._all(reference, descriptor.digest, manifest)

        async with self._turns.turn(reference.host):
            self._opener.expect()
            return await self._registry.fetch_image(reference, platform, resolved)

    def above(self, request: RemoteRequest, reference: Reference) -> None:
        """Begin to open the layers above one that is asked for, and to look for its image's profile.

        Args:
            request: what the labels of the layer say.
            reference: of its image.
        """
        manifest = request.manifest_digest
        if manifest is None:
            return
        self._nursery.start_soon(self._finder.look, reference, manifest)
        if request.upper_layers and self._first_time(manifest):
            for digest in request.upper_layers:
                self._nursery.start_soon(
                    self._open, LayerSource(reference, digest, manifest=manifest)
                )

    def _first_time(self, manifest: Digest) -> bool:
        now = trio.current_time()
        self._begun = {m: at for m, at in self._begun.items() if now - at < _AGAIN_SECONDS}
        if manifest in self._begun:
            return False
        self._begun[manifest] = now
        return True

    def _all(self, reference: Reference, digest: Digest, manifest: oci.Manifest) -> None:
        for layer in manifest.layers or ():
            source = LayerSource.of(layer, reference, digest)
            self._nursery.start_soon(self._open, source)

    async def _open(self, source: LayerSource) -> None:
        with advice(_log, "layer not opened ahead", layer=source.digest):
            told = partial(self._opened, source) if self._opened is not None else None
            await self._opener.open(source, told)
