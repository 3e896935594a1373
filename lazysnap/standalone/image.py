# SPDX-License-Identifier: Apache-2.0
"""The layers of an image into committed snapshots: lazily, or unpacked where that cannot be."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lazysnap import labels as names
from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, DigestMismatch, FormatError, Internal
from lazysnap.overlay import Kind, Mount
from lazysnap.registry.image import Image
from lazysnap.snapshotter.interfaces import LayerBlob
from lazysnap.snapshotter.snapshotter import Snapshotter
from lazysnap.standalone.engine import Engine

_UNPACKED = (oci.LayerKind.GZIP, oci.LayerKind.ZSTD, oci.LayerKind.UNCOMPRESSED)


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer.

    Attributes:
        digest: of its blob.
        size: of the blob, in bytes.
        state: `lazy` or `unpacked`.
        reason: why it is not lazy, as a code.
    """

    digest: str
    size: int
    state: str
    reason: str | None = None


@dataclass(frozen=True)
class Composition:
    """How overlay is to show a snapshot.

    Attributes:
        lower: directories, uppermost first.
        upper: what is written goes here; empty if nothing is.
        work: what overlay wants beside `upper`.
        options: more of its options.
    """

    lower: Sequence[str]
    upper: str
    work: str
    options: Sequence[str]


def composition(mounts: Sequence[Mount]) -> Composition:
    """Read what the snapshotter answers, which is meant for mount(8)."""
    (mount,) = mounts
    if mount.type == "bind":
        return Composition((mount.source,), "", "", ())
    known: dict[str, str] = {}
    options = []
    for option in mount.options:
        key, _, value = option.partition("=")
        if key in ("lowerdir", "upperdir", "workdir"):
            known[key] = value
        else:
            options.append(option)
    return Composition(
        known["lowerdir"].split(":"), known.get("upperdir", ""), known.get("workdir", ""), options
    )


async def bring(
    engine: Engine, image: Image, progress: Callable[[int, LayerResult], None]
) -> tuple[str, list[LayerResult]]:
    """Have a committed snapshot for each layer.

    Args:
        engine: of the root.
        image: of which.
        progress: called with each layer's number, from 0, and what became of it.

    Returns:
        The name of the uppermost snapshot, empty if there is no layer; and what became of each.

    Raises:
        LazysnapError: a layer cannot be had.
    """
    blobs = image.manifest.layers or ()
    parent = ""
    results = []
    for number, (diff_id, chain_id) in enumerate(
        zip(image.config.diff_ids, image.config.chain_ids(), strict=True)
    ):
        labels = image.layer_labels(number, chain_id)
        parent = await _bring(
            engine, image, blobs[number], diff_id=diff_id, parent=parent, labels=labels
        )
        found = (await engine.snapshotter.stat(parent)).labels
        result = LayerResult(
            blobs[number].digest,
            blobs[number].size,
            "lazy" if names.REMOTE in found else "unpacked",
            found.get(names.REASON),
        )
        progress(number, result)
        results.append(result)
    return parent, results


async def _bring(
    engine: Engine,
    image: Image,
    blob: oci.Descriptor,
    *,
    diff_id: Digest,
    parent: str,
    labels: dict[str, str],
) -> str:
    """Have a committed snapshot of one layer; its name."""
    chain_id = labels[names.SNAPSHOT_REF]
    found = await committed(engine.snapshotter, labels, parent)
    if found is not None:
        return found
    token = secrets.token_hex(8)
    key = f"unpack {token}"
    try:
        prepared = await engine.snapshotter.prepare(key, parent, labels)
    except AlreadyExists:
        found = await committed(engine.snapshotter, labels, parent)
        if found is None:
            raise Internal(f"the snapshot of {blob.digest} is gone") from None
        return found
    await _unpack(engine, image, blob, diff_id, composition(prepared))
    name = f"{chain_id}@{token}"
    await engine.snapshotter.commit(name, key, labels)
    return name


async def committed(snapshotter: Snapshotter, labels: Mapping[str, str], parent: str) -> str | None:
    """The name of the snapshot of a layer on a parent, if there is one.

    Args:
        snapshotter: started; it also works in the background, so its database is asked through it.
        labels: by which the layer is asked for.
        parent: name of the snapshot below, or empty.
    """
    chain_id = labels[names.SNAPSHOT_REF]
    after: str | None = None
    while True:
        found, after = await snapshotter.list(after=after)
        for each in found:
            chain = each.labels.get(names.SNAPSHOT_REF)
            if (each.kind, each.parent, chain) != (Kind.COMMITTED, parent, chain_id):
                continue
            if await snapshotter.may_answer(each.name, labels):
                return each.name
        if after is None:
            return None


async def _unpack(
    engine: Engine, image: Image, blob: oci.Descriptor, diff_id: Digest, where: Composition
) -> None:
    if oci.layer_kind(blob.media_type) not in _UNPACKED:
        raise FormatError(
            f"layer {blob.digest} is of type {blob.media_type}, which lazysnap cannot unpack"
        )
    layer = LayerBlob(image.reference, blob.digest, blob.size)
    # The lowest layer has nothing below it, and is shown by a bind of its own directory.
    target, lower = (where.upper, where.lower) if where.upper else (where.lower[0], ())
    answer = await engine.unpacker.unpack(layer, target, lower)
    if answer.diff_id != diff_id:
        raise DigestMismatch(
            f"layer {blob.digest} unpacks to {answer.diff_id}, the image's configuration says"
            f" {diff_id}",
            hint="the image is damaged: build and push it again",
        )
