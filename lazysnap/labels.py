# SPDX-License-Identifier: Apache-2.0
"""Snapshot labels: how a pulling client tells a remote snapshotter which layer it wants.

Both directions: `layer_labels` makes the labels that `lazysnap pull` sends, `parse_remote_request`
reads what any client sent. The label sets are those of containerd's CRI plugin and transfer service
(containerd pkg/snapshotters/annotations.go), of `ctr-remote images rpull` (stargz-snapshotter
fs/source/source.go) and lazysnap's own, which spare the snapshotter a fetch of the manifest.

Invariant: labels without `containerd.io/snapshot.ref` are never a request, because users can set the
others on pods. Does no I/O and does not judge references; a caller parses those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, NotLazy

PREFIX = "containerd.io/snapshot/"
"""Only labels with this prefix, and `SNAPSHOT_REF`, reach a proxy snapshotter."""

SNAPSHOT_REF = "containerd.io/snapshot.ref"
"""The chain id of the layer; its presence makes a Prepare a request for a remote snapshot."""

REMOTE = "containerd.io/snapshot/remote"
"""Set on lazily mounted snapshots; buildkit looks for its presence."""

CRI_IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
CRI_LAYER_DIGEST = "containerd.io/snapshot/cri.layer-digest"
CRI_MANIFEST_DIGEST = "containerd.io/snapshot/cri.manifest-digest"
CRI_IMAGE_LAYERS = "containerd.io/snapshot/cri.image-layers"

STARGZ_REFERENCE = "containerd.io/snapshot/remote/stargz.reference"
STARGZ_DIGEST = "containerd.io/snapshot/remote/stargz.digest"
STARGZ_LAYERS = "containerd.io/snapshot/remote/stargz.layers"
STARGZ_SKIP_VERIFY = "containerd.io/snapshot/remote/stargz.skipverify"
STARGZ_TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
"""An annotation of eStargz layers in the manifest, and by inheritance a label."""

LAYER_SIZE = "containerd.io/snapshot/lazysnap.layer-size"
MEDIA_TYPE = "containerd.io/snapshot/lazysnap.media-type"
REASON = "containerd.io/snapshot/lazysnap.reason"
"""Set by the snapshotter: why a layer is not lazy."""

EAGER = "containerd.io/snapshot/lazysnap.eager"
"""Set by the snapshotter: `direct` if it unpacks layers that are not lazy by itself."""

ANNOTATION_PREFIX = "containerd.io/snapshot/lazysnap.annotation."
"""Before the short name of an annotation that containerd would not hand on by itself."""

_SHORT_NAMES = {
    "io.containers.zstd-chunked.manifest-checksum": "containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-position": "containers.zstd-chunked.manifest-position",
    "io.github.containers.zstd-chunked.manifest-checksum": "github.zstd-chunked.manifest-checksum",
    "io.github.containers.zstd-chunked.manifest-position": "github.zstd-chunked.manifest-position",
}
_LONG_NAMES = {ANNOTATION_PREFIX + short: long for long, short in _SHORT_NAMES.items()}

MAX_LABEL_BYTES = 4096
"""containerd refuses a label whose key and value have more bytes together (labels/validate.go)."""


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    """What a client asks for when it wants a layer mounted remotely.

    Attributes:
        chain_id: the value of `containerd.io/snapshot.ref`.
        reference: the image reference as the client wrote it, not parsed.
        layer_digest: digest of the compressed layer blob.
        layer_size: its size in bytes, if the client told.
        media_type: its media type, if the client told.
        manifest_digest: the platform's manifest, if the client told.
        upper_layers: blobs of the layers above this one that will be asked for next, bottom first.
        annotations: annotations of the layer's descriptor that arrived, by their full names. Their
            absence means nothing unless `media_type` is there (then lazysnap's client sent all).
        toc_digest: digest of the uncompressed eStargz TOC, the root of trust of its content.
        skip_verify: the client accepts a layer whose content cannot be verified.
    """

    chain_id: str
    reference: str
    layer_digest: Digest
    layer_size: int | None = None
    media_type: str | None = None
    manifest_digest: Digest | None = None
    upper_layers: tuple[Digest, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    toc_digest: Digest | None = None
    skip_verify: bool = False


def parse_remote_request(labels: Mapping[str, str]) -> RemoteRequest | None:
    """Read the labels of a Prepare.

    Args:
        labels: all labels of the request.

    Returns:
        The request, or None when the labels do not ask for a remote snapshot.

    Raises:
        NotLazy: a remote snapshot is asked for, but the labels do not say of which image (reason
            `no-image-labels`), or are malformed (reason `bad-image-labels`).
    """
    chain_id = labels.get(SNAPSHOT_REF)
    if not chain_id:
        return None
    if labels.get(CRI_IMAGE_REF) and labels.get(CRI_LAYER_DIGEST):
        reference, digest = labels[CRI_IMAGE_REF], labels[CRI_LAYER_DIGEST]
        layers = labels.get(CRI_IMAGE_LAYERS, "")
    elif labels.get(STARGZ_REFERENCE) and labels.get(STARGZ_DIGEST):
        reference, digest = labels[STARGZ_REFERENCE], labels[STARGZ_DIGEST]
        layers = labels.get(STARGZ_LAYERS, "")
    else:
        raise NotLazy(
            f"the client asks for {chain_id} without saying which image it is of",
            hint="with CRI set disable_snapshot_annotations = false; else use lazysnap pull",
            reason="no-image-labels",
        )
    layer_digest = _digest(digest, "layer digest")
    manifest, toc = labels.get(CRI_MANIFEST_DIGEST), labels.get(STARGZ_TOC_DIGEST)
    return RemoteRequest(
        chain_id=chain_id,
        reference=reference,
        layer_digest=layer_digest,
        layer_size=_size(labels.get(LAYER_SIZE)),
        media_type=labels.get(MEDIA_TYPE) or None,
        manifest_digest=_digest(manifest, "manifest digest") if manifest else None,
        upper_layers=_upper_layers(layers, layer_digest),
        annotations=MappingProxyType(_annotations(labels)),
        toc_digest=_digest(toc, "TOC digest") if toc else None,
        skip_verify=labels.get(STARGZ_SKIP_VERIFY) == "true",
    )


def layer_labels(
    *,
    chain_id: str,
    reference: str,
    manifest_digest: str,
    layer_digests: Sequence[str],
    size: int,
    media_type: str,
    annotations: Mapping[str, str],
) -> dict[str, str]:
    """The labels with which `lazysnap pull` prepares a layer.

    Args:
        chain_id: of the layer.
        reference: the image's full reference.
        manifest_digest: of the platform's manifest.
        layer_digests: blob digests of this layer and all above it, in the manifest's order.
        size: of the layer's blob in bytes.
        media_type: of the layer's blob.
        annotations: of the layer's descriptor in the manifest.

    Returns:
        Labels of which none exceeds containerd's limit; the list of layers is cut to fit.
    """
    labels = inherited(annotations)
    for name, short in _SHORT_NAMES.items():
        if name in annotations:
            labels[ANNOTATION_PREFIX + short] = annotations[name]
    labels |= {
        CRI_IMAGE_REF: reference,
        CRI_LAYER_DIGEST: layer_digests[0],
        CRI_MANIFEST_DIGEST: manifest_digest,
        CRI_IMAGE_LAYERS: _fitting(CRI_IMAGE_LAYERS, layer_digests),
        LAYER_SIZE: str(size),
        MEDIA_TYPE: media_type,
        SNAPSHOT_REF: chain_id,
    }
    # An oversized label would make containerd refuse the whole pull, an absent one only costs
    # laziness; containerd drops empty values, so none are sent.
    return {key: value for key, value in labels.items() if value and _fits(key, value)}


def inherited(annotations: Mapping[str, str]) -> dict[str, str]:
    """The annotations that containerd's clients hand on as labels by themselves."""
    return {
        key: value
        for key, value in annotations.items()
        if key.startswith(PREFIX) or key == SNAPSHOT_REF
    }


def _annotations(labels: Mapping[str, str]) -> dict[str, str]:
    found = {name: labels[key] for key, name in _LONG_NAMES.items() if key in labels}
    if STARGZ_TOC_DIGEST in labels:
        found[STARGZ_TOC_DIGEST] = labels[STARGZ_TOC_DIGEST]
    return found


def _digest(text: str, what: str) -> Digest:
    try:
        return Digest.parse(text)
    except FormatError as error:
        raise NotLazy(f"label with the {what}: {error}", reason="bad-image-labels") from error


def _size(text: str | None) -> int | None:
    # Only spares a request, so nonsense counts as unknown. int() would take "1_0" and " 1".
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 18:
        return None
    return int(text)


def _upper_layers(text: str, own: Digest) -> tuple[Digest, ...]:
    upper = []
    for part in text.split(","):
        try:
            digest = Digest.parse(part)
        except FormatError:  # a hint about what comes next: not worth refusing the layer
            continue
        if digest != own:
            upper.append(digest)
    return tuple(dict.fromkeys(upper))


def _fits(key: str, value: str) -> bool:
    return len(key.encode()) + len(value.encode()) <= MAX_LABEL_BYTES


def _fitting(key: str, digests: Iterable[str]) -> str:
    value = ""
    for digest in digests:
        longer = f"{value},{digest}" if value else digest
        if not _fits(key, longer):
            break
        value = longer
    return value
