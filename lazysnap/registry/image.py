# SPDX-License-Identifier: Apache-2.0
"""An image for one platform, put together from its documents, wherever these come from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lazysnap import labels, oci
from lazysnap.errors import FormatError, RegistryNotFound
from lazysnap.platforms import Platform
from lazysnap.reference import Reference

_DEEPEST_INDEX = 3


@dataclass(frozen=True)
class Image:
    """An image for one platform, without its layers.

    Attributes:
        reference: as it was asked for.
        top: what the reference points to: an index or a manifest.
        documents: the indexes and the manifest with their bytes, from `top` downward.
        descriptor: of the manifest.
        manifest: of the platform.
        config: the image's configuration.
        config_bytes: as the registry has it.
    """

    reference: Reference
    top: oci.Descriptor
    documents: tuple[tuple[oci.Descriptor, bytes], ...]
    descriptor: oci.Descriptor
    manifest: oci.Manifest
    config: oci.ImageConfig
    config_bytes: bytes

    def layer_labels(self, number: int, chain_id: str) -> dict[str, str]:
        """The labels with which a layer is asked for, see `lazysnap.labels.layer_labels`.

        Args:
            number: of the layer, from 0 for the lowest.
            chain_id: by which its snapshot is found.
        """
        layers = self.manifest.layers or ()
        layer = layers[number]
        return labels.layer_labels(
            chain_id=chain_id,
            reference=self.reference.name,
            manifest_digest=self.descriptor.digest,
            layer_digests=[each.digest for each in layers[number:]],
            size=layer.size,
            media_type=layer.media_type,
            annotations=layer.annotations or {},
        )


Read = Callable[[oci.Descriptor], Awaitable[bytes]]
Resolved = Callable[[oci.Descriptor, oci.Manifest], None]


async def assemble(
    reference: Reference,
    platform: Platform,
    top: tuple[oci.Descriptor, bytes],
    read: Read,
    resolved: Resolved | None = None,
) -> Image:
    """Find the manifest for a platform, and its configuration.

    Args:
        reference: of the image.
        platform: to choose for where there is a choice.
        top: what the reference points to, and its bytes.
        read: gets another document, checked against its digest.
        resolved: told the manifest as soon as it is known, before the configuration is read.

    Raises:
        RegistryNotFound: there is nothing for the platform.
        FormatError: a document is malformed, or not what another says of it.
        LazysnapError: or what `read` raises.
    """
    descriptor, data = top
    documents = [top]
    document = oci.parse_document(data, descriptor.media_type)
    while isinstance(document, oci.Index):
        if len(documents) > _DEEPEST_INDEX:
            raise FormatError(f"{reference}: too many indexes within each other")
        descriptor = document.choose(platform)
        data = await read(descriptor)
        if len(data) != descriptor.size:
            raise FormatError(
                f"{reference}: {descriptor.digest} has {len(data)} bytes,"
                f" the index says {descriptor.size}"
            )
        documents.append((descriptor, data))
        document = oci.parse_document(data, descriptor.media_type)
    if resolved is not None:
        resolved(descriptor, document)
    config_bytes = await read(document.config)
    config = oci.parse_config(config_bytes)
    oci.check_layers(document, config)
    if config.os and config.architecture and platform.rank(config.platform) is None:
        raise RegistryNotFound(
            f"{reference} is for {config.platform}, not for {platform}", reason="no-platform"
        )
    return Image(
        reference=reference,
        top=top[0],
        documents=tuple(documents),
        descriptor=descriptor,
        manifest=document,
        config=config,
        config_bytes=config_bytes,
    )
