# SPDX-License-Identifier: Apache-2.0
"""Manifests, indexes and image configurations: bytes to checked objects.

Sources: the OCI image specification (manifest.md, image-index.md, config.md, layer.md) and docker's
manifest schema 2. Does no I/O; digests of the bytes are checked by whoever fetched them.

What a parse function returns has the right types everywhere, well-formed digests, sizes that are
not negative, and is not a manifest and an index at once (CVE-2021-41190).
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, RegistryNotFound
from lazysnap.platforms import Platform

MAX_DOCUMENT = 8 << 20
"""Largest manifest, index or image configuration that is read, in bytes."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_LIST})
CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG})

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
"""eStargz and stargz' zstd:chunked: digest of the uncompressed TOC JSON."""
TOC_LAYER_DIGEST = "containerd.io/snapshot/stargz/layer.digest"
"""External TOC image: which layer a TOC is for."""
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
ZSTD_CHUNKED_PREFIXES = ("io.github.containers.zstd-chunked.", "io.containers.zstd-chunked.")
"""containers/storage's dialect first; stargz-snapshotter's second."""
ZSTD_CHUNKED_CHECKSUM = "manifest-checksum"
ZSTD_CHUNKED_POSITION = "manifest-position"
_PROMISES = (TOC_DIGEST, *(prefix + ZSTD_CHUNKED_CHECKSUM for prefix in ZSTD_CHUNKED_PREFIXES))
OPENING_ANNOTATIONS = frozenset(_PROMISES) | {
    prefix + ZSTD_CHUNKED_POSITION for prefix in ZSTD_CHUNKED_PREFIXES
}
"""The annotations of a layer by which it can be opened lazily, and opened again."""
SOCI_INDEX_DIGEST = "com.amazon.soci.index-digest"
SOCI_LAYER_DIGEST = "com.amazon.soci.image-layer-digest"

_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class LayerKind(enum.StrEnum):
    """What a layer's media type says about its bytes."""

    GZIP = "gzip"
    ZSTD = "zstd"
    UNCOMPRESSED = "uncompressed"
    ENCRYPTED = "encrypted"
    FOREIGN = "foreign"
    """May not be pushed to other registries, and may have to come from its `urls`."""
    UNKNOWN = "unknown"


_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_LAYER_KINDS = {
    OCI_LAYER: LayerKind.UNCOMPRESSED,
    OCI_LAYER_GZIP: LayerKind.GZIP,
    OCI_LAYER_ZSTD: LayerKind.ZSTD,
    _DOCKER_LAYER: LayerKind.UNCOMPRESSED,
    DOCKER_LAYER_GZIP: LayerKind.GZIP,
    _DOCKER_LAYER + ".zstd": LayerKind.ZSTD,
}


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A pointer to content: media type, digest and size in bytes."""

    media_type: str
    digest: Digest
    size: _Size
    annotations: Mapping[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str | None = None
    urls: tuple[str, ...] | None = None

    def annotation(self, name: str) -> str | None:
        """The value of an annotation, if there is one."""
        return self.annotations.get(name) if self.annotations else None

    @property
    def is_index(self) -> bool:
        """Whether it points to an index or manifest list."""
        return self.media_type in INDEX_TYPES

    @property
    def is_manifest(self) -> bool:
        """Whether it points to an image manifest."""
        return self.media_type in MANIFEST_TYPES


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest; also the shape of SOCI indexes and other artifacts."""

    schema_version: int
    config: Descriptor
    layers: tuple[Descriptor, ...] | None = None
    media_type: str = ""
    annotations: Mapping[str, str] | None = None
    subject: Descriptor | None = None
    artifact_type: str | None = None

    def annotation(self, name: str) -> str | None:
        """The value of an annotation, if there is one."""
        return self.annotations.get(name) if self.annotations else None

    def layer(self, digest: str) -> Descriptor:
        """The first layer with this digest.

        Raises:
            RegistryNotFound: no layer has it.
        """
        for layer in self.layers or ():
            if layer.digest == digest:
                return layer
        raise RegistryNotFound(f"the manifest has no layer {digest}")


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """An image index or docker manifest list."""

    schema_version: int
    manifests: tuple[Descriptor, ...] | None = None
    media_type: str = ""
    annotations: Mapping[str, str] | None = None
    subject: Descriptor | None = None
    artifact_type: str | None = None

    def choose(self, platform: Platform) -> Descriptor:
        """The manifest that a machine of `platform` should run.

        Entries of an artifact (signatures, SOCI indexes) are passed over; entries that name no
        platform are taken only when no other fits.

        Raises:
            RegistryNotFound: none fits; the message lists what there is.
        """
        best: tuple[int, Descriptor] | None = None
        for entry in self.manifests or ():
            if not (entry.is_manifest or entry.is_index) or _is_artifact(entry):
                continue
            rank = 1 << 16 if entry.platform is None else platform.rank(entry.platform)
            if rank is not None and (best is None or rank < best[0]):
                best = (rank, entry)
        if best is None:
            have = sorted({str(e.platform or "unnamed") for e in self.manifests or ()})
            raise RegistryNotFound(
                f"the image has nothing for {platform}; it has {', '.join(have[:20]) or 'nothing'}",
                reason="no-platform",
            )
        return best[1]


class RootFS(msgspec.Struct, frozen=True):
    """Digests of the uncompressed layers, lowest first."""

    diff_ids: tuple[Digest, ...] | None = None
    type: str = "layers"


class ImageConfig(msgspec.Struct, frozen=True):
    """The parts of an image configuration that concern its file system."""

    rootfs: RootFS
    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    created: str | None = None

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """Digests of the uncompressed layers, lowest first."""
        return self.rootfs.diff_ids or ()

    @property
    def platform(self) -> Platform:
        """What the image says it runs on."""
        return Platform(self.os, self.architecture, self.variant, self.os_version).normalized()

    def chain_ids(self) -> list[Digest]:
        """The chain id of each layer, lowest first."""
        chain: list[Digest] = []
        for diff_id in self.diff_ids:
            chain.append(chain_id(chain[-1] if chain else None, diff_id))
        return chain


_ABSENT = msgspec.Raw()


class _Header(msgspec.Struct, rename="camel"):
    """The members that tell documents apart; nothing below them is looked at."""

    schema_version: int = 0
    media_type: str = ""
    manifests: msgspec.Raw = _ABSENT
    layers: msgspec.Raw = _ABSENT
    config: msgspec.Raw = _ABSENT
    fs_layers: msgspec.Raw = _ABSENT

    def has(self, name: str) -> bool:
        """Whether the member is there; Go writes an empty list as null."""
        return bytes(getattr(self, name)) not in (b"", b"null")


T = TypeVar("T")


def _hook(kind: type, value: Any) -> Any:
    if kind is not Digest:
        raise NotImplementedError(kind)
    if not isinstance(value, str):
        raise FormatError(f"a digest is a {type(value).__name__}, not a string")
    return Digest.parse(value)


def _decode(data: bytes, kind: type[T], what: str) -> T:
    if len(data) > MAX_DOCUMENT:
        raise FormatError(f"{what} has {len(data)} bytes, more than {MAX_DOCUMENT}")
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_hook)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{what} is malformed: {error}") from None


def parse_manifest(data: bytes) -> Manifest:
    """Read an image manifest (OCI or docker schema 2).

    Raises:
        FormatError: the bytes are something else.
    """
    found = parse_document(data)
    if not isinstance(found, Manifest):
        raise FormatError("expected an image manifest and got an index")
    return found


def parse_index(data: bytes) -> Index:
    """Read an image index or docker manifest list.

    Raises:
        FormatError: the bytes are something else.
    """
    found = parse_document(data)
    if not isinstance(found, Index):
        raise FormatError("expected an image index and got a manifest")
    return found


def parse_document(data: bytes, media_type: str = "") -> Manifest | Index:
    """Read whatever a registry serves under /manifests/.

    Args:
        data: all of the document, at most `MAX_DOCUMENT` bytes.
        media_type: what a descriptor or Content-Type says it is, if that is known.

    Raises:
        FormatError: malformed, of another kind than `media_type`, or two kinds at once.
    """
    header = _decode(data, _Header, "manifest")
    if header.has("fs_layers") or header.schema_version == 1:
        raise FormatError(
            "the image has a docker schema 1 manifest, which is no longer supported",
            hint="push the image again with a current tool",
        )
    if header.schema_version != 2:
        raise FormatError(f"manifest has schemaVersion {header.schema_version}, expected 2")
    if header.has("manifests") and (header.has("layers") or header.has("config")):
        raise FormatError("document is both a manifest and an index (CVE-2021-41190)")
    is_index = header.has("manifests") or not header.has("config")
    for declared in (header.media_type, media_type):
        if declared in (MANIFEST_TYPES if is_index else INDEX_TYPES):
            raise FormatError(f"document is not of its declared type {declared}")
    return _decode(data, Index, "index") if is_index else _decode(data, Manifest, "manifest")


def parse_config(data: bytes) -> ImageConfig:
    """Read an image configuration.

    Raises:
        FormatError: the bytes are something else.
    """
    return _decode(data, ImageConfig, "image configuration")


def chain_id(parent: Digest | None, diff_id: Digest) -> Digest:
    """The chain id of a layer on top of a chain (OCI image-spec config.md).

    Args:
        parent: chain id of all layers below; None for the lowest.
        diff_id: digest of the layer's uncompressed tar.
    """
    if parent is None:
        return diff_id
    return Digest.from_hash(hashlib.sha256(f"{parent} {diff_id}".encode()))


def layer_kind(media_type: str) -> LayerKind:
    """What to expect in a layer of this media type (OCI layer.md, docker schema 2, ocicrypt)."""
    kind = media_type.partition(";")[0].strip()
    if kind.endswith("+encrypted"):
        return LayerKind.ENCRYPTED
    if ".nondistributable." in kind or ".rootfs.foreign." in kind:
        return LayerKind.FOREIGN
    return _LAYER_KINDS.get(kind, LayerKind.UNKNOWN)


def toc_promise(annotations: Mapping[str, str]) -> str:
    """The promises that annotations make for the table of contents, as one text; empty if they make none.

    That is its digest alone if there is one: it is always checked, and some clients hand on nothing
    else, though all must find the same index. Otherwise it is all digests of its frame, of which only
    one is checked.
    """
    if annotations.get(TOC_DIGEST):
        return annotations[TOC_DIGEST]
    return ",".join(annotations[name] for name in _PROMISES if annotations.get(name))


def check_layers(manifest: Manifest, config: ImageConfig) -> None:
    """Check that every layer has its diff id.

    Raises:
        FormatError: their numbers differ.
    """
    layers = len(manifest.layers or ())
    if layers != len(config.diff_ids):
        raise FormatError(f"the manifest has {layers} layers and {len(config.diff_ids)} diff ids")


def _is_artifact(entry: Descriptor) -> bool:
    return bool(entry.artifact_type) and entry.artifact_type not in CONFIG_TYPES
