# SPDX-License-Identifier: Apache-2.0
"""What one registry says of a blob is not believed for another, and a name is no proof of a layer."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError, RegistryError
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.identity import index_name
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.opener import Opener
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.tree_images import tree_name
from lazysnap.layers.view import open_index
from lazysnap.paths import INDEX_TAIL
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.hosts import RegistrySettings
from tests.support import layers
from tests.support.layers import Layer
from tests.support.registry import FaultyRegistry, faulty_registry

_ENTRIES = [layers.file(f"{n}", b"%d" % n * 3000) for n in range(9)]
_FOOTER = len(layers.estargz_footer(0))


def _honest() -> Layer:
    """A layer whose table of contents is not compressed as far as it can be."""
    layer = layers.estargz(_ENTRIES)
    table = gzip.compress(_table(layer), 0, mtime=0)
    blob = layer.blob[: layer.toc_offset] + table + layer.blob[-_FOOTER:]
    return replace(layer, blob=blob)


def _table(layer: Layer) -> bytes:
    return gzip.decompress(layer.blob[layer.toc_offset : -_FOOTER])


_HONEST = _honest()


def _poisoned(layer: Layer, *, same_size: bool) -> bytes:
    """The true table of contents of a layer at another place, behind members that are none."""
    table = gzip.compress(_table(layer), 9, mtime=0)
    place = layer.size - _FOOTER - len(table) if same_size else layer.toc_offset + 100
    return bytes(place) + table + layers.estargz_footer(place)


class Two:
    """An opener, an honest registry and a hostile one."""

    def __init__(self, honest: FaultyRegistry, hostile: FaultyRegistry, opener: Opener) -> None:
        self.honest = honest
        self.hostile = hostile
        self.opener = opener

    def source(self, server: FaultyRegistry, layer: Layer, **fields: Any) -> LayerSource:
        known = {"size": layer.size, "annotations": layer.annotations, "complete": True}
        return LayerSource(
            Reference.parse(f"{server.host}/repo:tag"),
            Digest.parse(layer.digest),
            **{**known, **fields},
        )

    def add_image(self, tag: str, layer: Layer, annotations: dict[str, str]) -> Digest:
        """Serve a manifest with one layer; its digest."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": {"mediaType": oci.OCI_CONFIG, "digest": str(Digest.of(b"")), "size": 0},
            "layers": [{**layer.descriptor, "annotations": annotations}],
        }
        data = json.dumps(manifest).encode()
        return self.honest.add_manifest("repo", tag, oci.OCI_MANIFEST, data)

    def path(self, opened: OpenedLayer) -> Path:
        return Path(self.opener._directory, opened.index)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    (tmp_path / "index").mkdir()
    (tmp_path / "trees").mkdir()
    async with (
        faulty_registry() as honest,
        faulty_registry() as hostile,
        trio.open_nursery() as nursery,
    ):
        hosts = frozenset({honest.host, hostile.host})
        settings = RegistrySettings(plain_http_hosts=hosts, retry_seconds=1)
        async with Registry(settings) as registry:
            builders = BuilderPool(2)
            nursery.start_soon(builders.run)
            trees = str(tmp_path / "trees")
            yield Two(
                honest, hostile, Opener(str(tmp_path / "index"), registry, builders, trees=trees)
            )
            nursery.cancel_scope.cancel()


def _record(source: LayerSource, opened: OpenedLayer, **fields: Any) -> SlotRecord:
    return SlotRecord(
        slot=1,
        shard=0,
        layer_digest=str(source.digest),
        index=opened.index,
        annotations=dict(opened.annotations),
        reference=source.reference.name,
        blob_size=opened.blob_size,
        manifest=str(source.manifest or ""),
        described=opened.described or msgspec.UNSET,
        **fields,
    )


@pytest.mark.parametrize("same_size", [True, False])
async def test_an_index_that_a_hostile_registry_made_is_not_used_for_others(
    two: Two, same_size: bool
) -> None:
    two.hostile.blobs[Digest.parse(_HONEST.digest)] = _poisoned(_HONEST, same_size=same_size)
    two.honest.add_blob(_HONEST.blob)
    size = _HONEST.size if same_size else None
    evil = await two.opener.open(two.source(two.hostile, _HONEST, size=size))
    source = two.source(two.honest, _HONEST)
    good = await two.opener.open(source)
    index = open_index(str(two.path(good)))
    assert (index.blob_size, index.toc_offset) == (_HONEST.size, _HONEST.toc_offset)
    assert open_index(str(two.path(evil))).toc_offset != _HONEST.toc_offset
    # Both stay: neither makes the other's anew again and again.
    requests = len(two.honest.log), len(two.hostile.log)
    assert await two.opener.open(source) == good
    assert await two.opener.open(two.source(two.hostile, _HONEST, size=size)) == evil
    assert (len(two.honest.log), len(two.hostile.log)) == requests
    # Nor does a snapshot of the one answer for the other.
    record = _record(two.source(two.hostile, _HONEST), evil)
    assert not await two.opener.is_same(source, record)
    assert await two.opener.is_same(two.source(two.hostile, _HONEST, size=size), record)


async def test_repositories_that_say_the_same_share_an_index(two: Two) -> None:
    for server in (two.honest, two.hostile):
        server.add_blob(_HONEST.blob)
    first = await two.opener.open(two.source(two.honest, _HONEST))
    second = await two.opener.open(two.source(two.hostile, _HONEST))
    assert first.index != second.index
    assert os.path.samefile(two.path(first), two.path(second))
    assert os.path.exists(f"{two.path(first)}{INDEX_TAIL}")
    assert not os.path.exists(f"{two.path(second)}{INDEX_TAIL}")  # bytes of the other registry
    trees = [os.path.join(two.opener._trees, tree_name(each.index)) for each in (first, second)]
    assert os.path.samefile(*trees)
    [request] = two.hostile.log
    assert request.sent < 1024  # the footer, and not a table of contents again
    record = _record(two.source(two.honest, _HONEST), first)
    assert await two.opener.is_same(two.source(two.hostile, _HONEST), record)


async def test_a_registry_that_does_not_have_a_blob_gets_no_index(two: Two) -> None:
    two.honest.add_blob(_HONEST.blob)
    first = await two.opener.open(two.source(two.honest, _HONEST))
    with pytest.raises(RegistryError):
        await two.opener.open(two.source(two.hostile, _HONEST))
    record = _record(two.source(two.honest, _HONEST), first)
    with pytest.raises(LazysnapError):
        await two.opener.is_same(two.source(two.hostile, _HONEST), record)


async def test_an_index_of_another_size_is_not_used(two: Two) -> None:
    """A manifest that lies about the size opens nothing, and takes nothing from those that do not."""
    two.honest.add_blob(_HONEST.blob)
    good = await two.opener.open(two.source(two.honest, _HONEST))
    before = two.path(good).read_bytes()
    with pytest.raises(RegistryError, match=f"{_HONEST.size} bytes, expected"):
        await two.opener.open(two.source(two.honest, _HONEST, size=_HONEST.size + 1))
    assert two.path(good).read_bytes() == before


async def test_an_index_of_an_old_release_is_compared_before_it_is_used(two: Two) -> None:
    """It had one name for all repositories, and may be a lie of any of them."""
    two.honest.add_blob(_HONEST.blob)
    source = two.source(two.honest, _HONEST)
    old = replace(await two.opener.open(source), index=_old_name(source))
    made = two.path(await two.opener.open(source))
    made.rename(two.path(old))
    record = _record(source, old)
    opened = await two.opener.open(source)
    assert os.path.samefile(two.path(opened), two.path(old))
    assert await two.opener.is_same(source, record)
    # What one slot has open under the old name is made anew there.
    two.path(old).write_bytes(b"damaged")
    two.path(opened).unlink()
    assert (await two.opener.open(source, name=old.index)).index == old.index
    assert open_index(str(two.path(old))).blob_size == _HONEST.size


def _old_name(source: LayerSource) -> str:
    name = index_name(source.digest, oci.toc_promise(source.annotations), source.reference)
    return name.rpartition("-")[0]


async def test_another_promise_or_blob_is_another_layer(two: Two) -> None:
    other = layers.estargz([layers.file("other", b"other")])
    for layer in (_HONEST, other):
        two.honest.add_blob(layer.blob)
    source = two.source(two.honest, _HONEST)
    record = _record(source, await two.opener.open(source))
    before = len(two.honest.log)
    assert await two.opener.is_same(source, record)
    assert not await two.opener.is_same(two.source(two.honest, other), record)
    forged = two.source(two.honest, _HONEST, annotations=other.annotations)
    assert not await two.opener.is_same(forged, record)
    plain = two.source(two.honest, _HONEST, annotations={})
    assert not await two.opener.is_same(plain, record)
    assert not await two.opener.is_same(replace(source, size=_HONEST.size + 1), record)
    assert len(two.honest.log) == before


async def test_the_manifest_tells_what_labels_do_not(two: Two) -> None:
    """As with CRI, which hands on no more than the digest of the manifest."""
    layer = layers.zstd_chunked(_ENTRIES, dialect="containers")
    plain = layers.plain(_ENTRIES)
    two.honest.add_blob(layer.blob)
    manifest = two.add_image("tag", layer, layer.annotations)
    other = two.add_image("other", layer, {})
    asked = {"size": None, "annotations": {}, "complete": False}
    source = two.source(two.honest, layer, manifest=manifest, **asked)
    record = _record(source, await two.opener.open(source))
    assert record.described is True
    before = len(two.honest.log)
    two.honest.manifests.clear()
    assert await two.opener.is_same(source, record)  # by what is remembered
    two.opener._registry._manifests.clear()
    assert await two.opener.is_same(source, record)  # by the digest that was read before
    assert len(two.honest.log) == before
    # Labels that named a manifest which nobody has read prove nothing.
    with pytest.raises(LazysnapError):
        await two.opener.is_same(source, _record(source, _undescribed(record)))
    with pytest.raises(LazysnapError):
        await two.opener.is_same(replace(source, manifest=other), record)
    again = two.add_image("other", layer, {})
    assert again == other
    assert not await two.opener.is_same(replace(source, manifest=other), record)
    assert not await two.opener.is_same(two.source(two.honest, plain, manifest=manifest), record)


def _undescribed(record: SlotRecord) -> OpenedLayer:
    return OpenedLayer(record.index, record.blob_size, record.annotations)


async def test_a_promise_that_is_not_kept_leaves_no_index_where_unverified_ones_are_allowed(
    two: Two,
) -> None:
    """A checksum that belongs to no position is not checked, and yet is a part of the name."""
    layer = layers.zstd_chunked(_ENTRIES, dialect="containers")
    two.honest.add_blob(layer.blob)
    position = layers.CONTAINERS_PREFIX + "manifest-position"
    forged = {
        position: layer.annotations[position],
        layers.STARGZ_PREFIX + "manifest-checksum": str(Digest.of(b"of somebody else")),
    }
    old = two.opener
    opener = Opener(old._directory, old._registry, old._builders, allow_unverified=True)
    with pytest.raises(LazysnapError):
        await opener.open(two.source(two.honest, layer, annotations=forged))
    assert os.listdir(old._directory) == []
    # Without any promise it may be opened, and that index is not used for one that promises.
    bare = {position: layer.annotations[position]}
    opened = await opener.open(two.source(two.honest, layer, annotations=bare))
    assert not open_index(str(two.path(opened))).verified
    assert oci.TOC_DIGEST not in opened.annotations
