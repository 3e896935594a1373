# SPDX-License-Identifier: Apache-2.0
"""Pulls that the daemon does for commands, see `daemon_client`, and what is left of those it cannot do.

It pulls only images of which every layer is lazy, or there: that takes little time and memory. What has to
be downloaded and unpacked is left to the command, with the documents of the image, which need not be
asked for twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazysnap import log, oci
from lazysnap.channel import Tell
from lazysnap.containerd.client import Containerd
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError, NotFound, NotLazy
from lazysnap.filesystem.open_ahead import OpenAhead
from lazysnap.oci import Descriptor
from lazysnap.platforms import Platform
from lazysnap.pull.daemon_client import pack_result
from lazysnap.pull.progress import LayerState, Progress
from lazysnap.pull.puller import pull
from lazysnap.pull.unpack import can_be_lazy
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.image import Image, assemble

_log = log.get(__name__)


class Delegated:
    """Pulls in the daemon.

    Args:
        registry: client.
        ahead: resolves images, and opens their layers meanwhile.
    """

    def __init__(self, registry: Registry, ahead: OpenAhead) -> None:
        self._registry = registry
        self._ahead = ahead

    async def pull(
        self,
        tell: Tell,
        reference: str,
        platform: str,
        address: str,
        namespace: str,
        snapshotter: str,
    ) -> dict[str, Any]:
        """Pull an image of which all layers are lazy.

        Args:
            tell: told the documents, then all layers, then where each is on its way.
            reference: of the image.
            platform: as `Platform.parse` takes it.
            address: containerd's socket.
            namespace: of containerd.
            snapshotter: its name in containerd's configuration.

        Returns:
            As `pack_result` makes it.

        Raises:
            LazysnapError: it cannot be pulled here; nothing of it is left, and the client can try.
        """
        parsed, wanted = Reference.parse(reference), Platform.parse(platform)
        image = await self._ahead.image(parsed, wanted)
        tell(pack_documents(image))
        if not all(can_be_lazy(layer) for layer in image.manifest.layers or ()):
            raise NotLazy("not all layers of the image can be lazy")
        async with Containerd(address, namespace) as containerd:
            result = await pull(
                parsed,
                containerd,
                self._registry,
                snapshotter,
                wanted,
                progress=_Told(tell),
                image=image,
                lazy_only=True,
            )
        _log.info("image pulled for a command", reference=reference, namespace=namespace)
        return pack_result(result)


class _Told(Progress):
    """Hands on what a pull tells."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def resolved(self, layers: Sequence[Descriptor]) -> None:
        self._tell({"layers": [[each.media_type, each.digest, each.size] for each in layers]})

    def state(self, layer: int, state: LayerState) -> None:
        self._tell({"layer": layer, "state": state})


def pack_documents(image: Image) -> dict[str, Any]:
    """The documents of an image as a message.

    `documents` is a list of media type and bytes from what the reference points to down to the manifest,
    `config` bytes.
    """
    return {
        "documents": [[each.media_type, data] for each, data in image.documents],
        "config": image.config_bytes,
    }


async def image_of(
    message: Mapping[str, Any], reference: Reference, platform: Platform
) -> Image | None:
    """The image that `pack_documents` made a message of.

    What the reference points to is the daemon's word, as it would otherwise be the registry's; all else
    is checked against its digest.

    Args:
        message: from the daemon.
        reference: of the image.
        platform: which of the image's platforms.

    Returns:
        None if the message is wrong.
    """
    try:
        return await _image(message, reference, platform)
    except (LazysnapError, LookupError, TypeError, ValueError) as error:
        _log.debug("the daemon does not know the image", error=error)
        return None


async def _image(message: Mapping[str, Any], reference: Reference, platform: Platform) -> Image:
    (media_type, data), *others = message["documents"]
    if reference.digest is not None:
        reference.digest.verify(data, f"manifest {reference}")
    digest = reference.digest or Digest.of(data)
    top = oci.Descriptor(media_type=media_type, digest=digest, size=len(data))
    documents: list[bytes] = [*(data for _, data in others), message["config"]]
    known = {Digest.of(each): each for each in documents}

    async def read(descriptor: oci.Descriptor) -> bytes:
        if descriptor.digest not in known:
            raise NotFound(f"the daemon has not sent {descriptor.digest}")
        return known[descriptor.digest]

    return await assemble(reference, platform, (top, data), read)
