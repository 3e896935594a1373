# SPDX-License-Identifier: Apache-2.0
"""Index, manifest and configuration of an image into containerd's content store, with the labels
by which garbage collection and other clients find their way (containerd docs/garbage-collection.md,
core/images/handlers.go).

Leaves the store as `ctr images pull` would. Knows no layers' bytes and no snapshots.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from lazysnap import oci
from lazysnap.containerd.content import Content
from lazysnap.errors import NotFound
from lazysnap.labels import MAX_LABEL_BYTES
from lazysnap.reference import Reference
from lazysnap.registry.image import Image

_GC_REF = "containerd.io/gc.ref.content."
_UNCOMPRESSED = "containerd.io/uncompressed"


class Labeller:
    """Labels that tell from which repository a blob came, so that a push can mount it.

    Args:
        content: containerd's content store.
        reference: the image that is pulled.
    """

    def __init__(self, content: Content, reference: Reference) -> None:
        self._content = content
        # containerd leaves out the port (core/remotes/docker/handler.go)
        host = urlsplit(f"//{reference.host}").hostname
        self._key = f"containerd.io/distribution.source.{host}"
        self._repository = reference.repository

    def source(self, present: str = "") -> dict[str, str]:
        """The label for a blob, given its value so far; none if it would be too long."""
        repositories = sorted({self._repository, *filter(None, present.split(","))})
        value = ",".join(repositories)
        if len(self._key) + len(value) > MAX_LABEL_BYTES:
            return {}
        return {self._key: value}

    async def add_source(self, digest: str) -> None:
        """Set the label on a blob that was there before."""
        info = await self._content.info(digest)
        present = info.labels.get(self._key, "")
        if self._repository not in present.split(","):
            labels = self.source(present)
            if labels:
                await self._content.set_labels(digest, labels)

    async def present(self, digest: str) -> str:
        """The label's value so far, empty if there is no such blob or label."""
        try:
            info = await self._content.info(digest)
        except NotFound:
            return ""
        return info.labels.get(self._key, "")

    async def uncompressed(self, digest: str, diff_id: str) -> None:
        """Note the digest of a layer's tar on its blob, as containerd's unpacker does."""
        await self._content.set_labels(digest, {_UNCOMPRESSED: diff_id})


async def store(content: Content, image: Image, labeller: Labeller) -> None:
    """Write the documents of an image, children first so that no label points nowhere.

    Args:
        content: containerd's content store, with the pull's lease.
        image: as the registry gave it.
        labeller: for the image's reference.
    """

    async def write(
        kind: str, descriptor: oci.Descriptor, data: bytes, labels: dict[str, str]
    ) -> None:
        labels |= labeller.source(await labeller.present(descriptor.digest))
        await content.write(f"{kind}-{descriptor.digest}", data, descriptor.digest, labels)

    await write("config", image.manifest.config, image.config_bytes, {})
    for descriptor, data in reversed(image.documents):
        document = oci.parse_document(data, descriptor.media_type)
        if isinstance(document, oci.Index):
            kind, labels = "index", _index_labels(document.manifests or ())
        else:
            kind, labels = "manifest", _manifest_labels(document)
        await write(kind, descriptor, data, labels)


def _manifest_labels(manifest: oci.Manifest) -> dict[str, str]:
    labels = {f"{_GC_REF}config": str(manifest.config.digest)}
    for number, layer in enumerate(manifest.layers or ()):
        labels[f"{_GC_REF}l.{number}"] = str(layer.digest)
    return labels


def _index_labels(children: Iterable[oci.Descriptor]) -> dict[str, str]:
    return {f"{_GC_REF}m.{number}": str(child.digest) for number, child in enumerate(children)}
