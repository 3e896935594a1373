# SPDX-License-Identifier: Apache-2.0
"""What the opener is given and what it returns. Only declarations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.reference import Reference


@dataclass(frozen=True, slots=True)
class LayerSource:
    """A layer that is to be opened.

    Attributes:
        reference: image that it is fetched by.
        digest: of the compressed blob.
        size: of the blob in bytes, if it is known.
        media_type: if it is known.
        annotations: of its descriptor, as far as they are known.
        manifest: digest of the manifest that has the rest, if it is known.
        complete: there are no other annotations than those given.
    """

    reference: Reference
    digest: Digest
    _: KW_ONLY
    size: int | None = None
    media_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    manifest: Digest | None = None
    complete: bool = False

    @classmethod
    def of(
        cls, layer: oci.Descriptor, reference: Reference, manifest: Digest | None = None
    ) -> LayerSource:
        """A layer as its manifest describes it, so that nothing more is to be known.

        Args:
            layer: its descriptor.
            reference: image that it is fetched by.
            manifest: digest of the manifest, if that is to be remembered.
        """
        return cls(
            reference,
            layer.digest,
            size=layer.size,
            media_type=layer.media_type,
            annotations=layer.annotations or {},
            manifest=manifest,
            complete=True,
        )


@dataclass(frozen=True, slots=True)
class OpenedLayer:
    """A layer whose index is on disk.

    Attributes:
        index: name of the file below `cache/index`.
        blob_size: in bytes.
        annotations: those that it was checked by; with them it can be opened again.
        fetched: whether bytes of it have just come from the registry.
        described: whether the manifest was read for the annotations.
    """

    index: str
    blob_size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    fetched: bool = False
    described: bool = False
