# SPDX-License-Identifier: Apache-2.0
"""What clients are told of a layer: the JSON of a `Layer` of containers/storage. No I/O.

Older releases (as Debian 12's Podman 4.3) ask for a layer by the digest of its blob, and compute ids
from the `diff-digest` that they are told. Newer ones (containers/storage 1.54, Podman 5.1) ask by the
digest of the table of contents, and refuse a `diff-digest` that nobody has verified; they take the
expected one.
"""

from __future__ import annotations

import json
from typing import Any

from lazysnap import oci

_UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
_TOC_DIGESTS = (
    oci.TOC_DIGEST,
    "io.github.containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-checksum",
)
# pkg/archive of containers/storage
_COMPRESSION = {
    oci.LayerKind.UNCOMPRESSED: 0,
    oci.LayerKind.GZIP: 2,
    oci.LayerKind.ZSTD: 4,
}


def position(manifest: oci.Manifest, digest: str) -> int | None:
    """Which layer of an image a client asks for.

    Args:
        manifest: of the image.
        digest: of the layer's blob or of its table of contents.
    """
    for number, layer in enumerate(manifest.layers or ()):
        if digest == layer.digest or digest in map(layer.annotation, _TOC_DIGESTS):
            return number
    return None


def information(layer: oci.Descriptor, diff_id: str, digest: str) -> bytes:
    """The content of `info`.

    Args:
        layer: as the image's manifest describes it.
        diff_id: of the layer, as the image's configuration says.
        digest: by which the client asks.
    """
    size = layer.annotation(_UNCOMPRESSED_SIZE) or ""
    facts: dict[str, Any] = {
        "compressed-diff-digest": layer.digest,
        "compressed-size": layer.size,
        "compression": _COMPRESSION.get(oci.layer_kind(layer.media_type), 0),
        # -1: not known
        "diff-size": int(size) if size.isascii() and size.isdigit() else -1,
    }
    if digest == layer.digest:
        facts["diff-digest"] = diff_id
    else:
        facts["toc-digest"] = digest
        facts["flags"] = {"expected-layer-diffid": diff_id}
    return json.dumps(facts).encode()
