# SPDX-License-Identifier: Apache-2.0
"""Opens a layer: from its digest and annotations to a verified index on disk.

At most one round trip for a layer that is not known (its tail holds the footer, usually all of the
table of contents, and tells the size), none for one that its repository is known to have. If another
repository has it, the end of the blob is compared, and nothing is built. See `lazysnap.layers.identity` for
what makes a layer the one that it is. Knows nothing of mounts.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

import trio

from lazysnap import log, oci, tracing
from lazysnap.errors import NotLazy, RegistryUnreachable
from lazysnap.formats.identify import FOOTER_SIZE, identify
from lazysnap.layers.builder import Job
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.host_turns import HostTurns
from lazysnap.layers.identity import (
    index_name,
    link_same,
    other_indexes,
    same_facts,
    size_of_known,
)
from lazysnap.layers.layer_source import LayerSource, OpenedLayer
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.tree_images import tree_name
from lazysnap.paths import INDEX_TAIL
from lazysnap.registry.client import Registry

_log = log.get(__name__)
_TAIL_LEAST = 128 << 10
_TAIL_MOST = 2 << 20
_TAIL_UNKNOWN = 256 << 10
# A table of contents has some 50 bytes for each file, so this is enough for files of 6 KiB each,
# compressed. A tail that is too short costs another round trip; one that is too long delays
# the other layers.
_TAIL_SHARE = 128
_TOC_MOST = 64 << 20
_OPENING_RATE = 32 << 10
"""Bytes per second of a layer's share of a slow line, on which sixteen layers are opened at a time."""
_RECENT_SECONDS = 30.0
_REMEMBERED = 1024
# A table of contents can take 64 MiB here while it is on its way to a builder.
_AT_ONCE = 32
_AT_ONCE_OF_HOST = 16


class Opener:
    """Opens layers.

    Args:
        index_directory: where indexes are kept.
        registry: client for manifests and blobs.
        builders: processes that build indexes.
        allow_unverified: accept layers for which no digest of the table of contents is known.
        trees: directory for images of layers' trees; empty if they are not needed.
    """

    def __init__(
        self,
        index_directory: str,
        registry: Registry,
        builders: BuilderPool,
        *,
        allow_unverified: bool = False,
        trees: str = "",
    ) -> None:
        self._directory = index_directory
        self._trees = trees
        self._registry = registry
        self._builders = builders
        self._allow_unverified = allow_unverified
        self._turns: dict[str, tuple[trio.Lock, int]] = {}
        self._host_turns = HostTurns(each=_AT_ONCE_OF_HOST, total=_AT_ONCE)
        self._fetched: dict[str, float] = {}
        self._indexed: dict[str, trio.Event] = {}  # of layers that are being built

    def expect(self) -> None:
        """Layers will be opened soon: get ready for them."""
        self._builders.expect()

    async def open(
        self,
        source: LayerSource,
        indexed: Callable[[OpenedLayer], object] | None = None,
        *,
        name: str = "",
    ) -> OpenedLayer:
        """Make sure that the layer's index is on disk.

        The image of its tree may still be made, if somebody else has opened the layer; see `finished`.

        Args:
            source: of the layer.
            indexed: called once, as soon as the index is on disk, which can be before the return.
            name: of the index, if it is in use under a name that it got long ago.

        Raises:
            NotLazy: it cannot be read lazily; `reason` says why.
            RegistryUnreachable: the registry does not answer, or not in time.
            LazysnapError: or another error.
        """
        _refuse_encrypted(source)
        described = self._lacks_promise(source)
        if described:
            source = await self._described(source)
            _refuse_encrypted(source)
        promise = oci.toc_promise(source.annotations)
        if not promise and not self._allow_unverified:
            raise NotLazy(
                "the manifest has no digest of a table of contents for this layer",
                hint="convert the image to eStargz or zstd:chunked",
                reason="no-toc-digest",
            )
        name = name or index_name(source.digest, promise, source.reference)
        size = None
        if name in self._indexed:
            await self._indexed[name].wait()
            size, _ = await self._known(source, name)
        told = False

        def tell(size: int) -> None:
            nonlocal told
            if indexed is not None and not told:
                told = True
                indexed(self._opened(source, name, size, described))

        if size is None:
            size = await self._ensure(source, name, tell)
        tell(size)
        return self._opened(source, name, size, described)

    def _opened(self, source: LayerSource, name: str, size: int, described: bool) -> OpenedLayer:
        fetched = time.monotonic() - self._fetched.get(name, float("-inf")) < _RECENT_SECONDS
        annotations = {k: v for k, v in source.annotations.items() if k in oci.OPENING_ANNOTATIONS}
        return OpenedLayer(name, size, annotations, fetched, described)

    async def is_same(self, source: LayerSource, record: SlotRecord) -> bool:
        """Whether a layer that was asked for is the one that a slot serves.

        Asks a registry only if the layer came from another repository, or if the manifest is needed and
        not remembered.

        Args:
            source: of the layer that was asked for.
            record: of the slot.

        Raises:
            LazysnapError: that cannot be known.
        """
        if source.digest != record.layer_digest:
            return False
        if self._lacks_promise(source):
            # The digest of a manifest is checked whenever it is read, so it promises the same again.
            if record.described is True and source.manifest == record.manifest:
                source = replace(source, annotations=record.annotations)
            else:
                source = await self._described(source)
        promise = oci.toc_promise(source.annotations)
        if promise != oci.toc_promise(record.annotations) or not (
            promise or self._allow_unverified
        ):
            return False
        if source.size not in (None, record.blob_size):
            return False
        if record.index == index_name(source.digest, promise, source.reference):
            return True
        opened = await self.open(source)
        return await trio.to_thread.run_sync(
            same_facts, self._path(opened.index), self._path(record.index)
        )

    async def _known(self, source: LayerSource, name: str) -> tuple[int | None, Sequence[str]]:
        """The size of the blob, if its index is there and fits; otherwise those of other repositories."""
        promise = oci.toc_promise(source.annotations)

        def look() -> tuple[int | None, Sequence[str]]:
            size = size_of_known(self._path(name), source.size, verified=bool(promise))
            if size is not None or not promise:
                return size, ()
            return None, other_indexes(self._directory, name, source.digest, promise)

        return await trio.to_thread.run_sync(look)

    async def _ensure(self, source: LayerSource, name: str, tell: Callable[[int], None]) -> int:
        """Build an index unless it is there; the size of the blob."""
        async with self._alone(name):
            size, others = await self._known(source, name)
            if size is None:
                async with self._host_turns.turn(source.reference.host):
                    with tracing.span("open layer", layer=source.digest):
                        self._indexed[name] = indexed = trio.Event()
                        try:
                            size = await self._adopt(source, name, others)
                            if size is None:
                                size = await self._build(source, name, indexed, tell)
                        finally:
                            indexed.set()
                            del self._indexed[name]
        return size

    def is_finished(self, opened: OpenedLayer) -> bool:
        """Whether nothing is made of a layer any more."""
        return opened.index not in self._turns

    async def finished(self, opened: OpenedLayer) -> None:
        """Wait until nothing is made of a layer any more."""
        async with self._alone(opened.index):
            pass

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """One task at a time for each name."""
        lock, users = self._turns.get(name, (trio.Lock(), 0))
        self._turns[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            users = self._turns[name][1] - 1
            if users:
                self._turns[name] = lock, users
            else:
                del self._turns[name]

    async def _described(self, source: LayerSource) -> LayerSource:
        """Complete a source from its manifest."""
        assert source.manifest is not None
        with self._in_time(source):
            manifest = await self._registry.image_manifest(
                source.reference, source.manifest, hurried=True
            )
        layer = manifest.layer(source.digest)
        return replace(
            source,
            size=layer.size,
            media_type=layer.media_type,
            annotations={**(layer.annotations or {}), **source.annotations},
            complete=True,
        )

    def _lacks_promise(self, source: LayerSource) -> bool:
        """Whether only its manifest can tell what is promised for a layer."""
        known = oci.toc_promise(source.annotations) or source.complete
        return not known and source.manifest is not None

    async def _adopt(self, source: LayerSource, name: str, others: Sequence[str]) -> int | None:
        """Take the index of another repository's blob, if this repository says the same of it.

        Args:
            source: of the layer.
            name: of the index.
            others: the indexes that there are.

        Returns:
            The size of the blob; None if the index has to be built.
        """
        if not others:
            return None
        blob = self._registry.blob(source.reference, source.digest, source.size, hurried=True)
        with self._in_time(source):
            tail = await blob.tail(FOOTER_SIZE)
        location = identify(tail.data, tail.size, source.annotations, source.media_type or "")
        self._note_fetched(name)
        link = partial(link_same, self._directory, name, others, location, trees=self._trees)
        linked = await trio.to_thread.run_sync(link)
        return tail.size if linked else None

    def _note_fetched(self, name: str) -> None:
        if len(self._fetched) >= _REMEMBERED:
            self._fetched.clear()
        self._fetched[name] = time.monotonic()

    async def _build(
        self, source: LayerSource, name: str, indexed: trio.Event, tell: Callable[[int], None]
    ) -> int:
        self.expect()
        with self._in_time(source, _tail_length(source)):
            data, size = await self._receive(source)
        job = Job(
            path=self._path(name),
            tree=os.path.join(self._trees, tree_name(name)) if self._trees else "",
            tail_path=self._path(name) + INDEX_TAIL,
            blob_size=size,
            annotations=dict(source.annotations),
            media_type=source.media_type or "",
            toc_digest=source.annotations.get(oci.TOC_DIGEST),
            # What was promised has to be kept, or the index would be taken for one that was checked.
            trusted=self._allow_unverified and not oci.toc_promise(source.annotations),
        )
        self._note_fetched(name)

        def stored() -> None:
            indexed.set()
            tell(size)

        answer = await self._builders.build(job, data, stored)
        _log.info("layer opened", layer=source.digest, nodes=answer.nodes, bytes=answer.total_size)
        return size

    async def _receive(self, source: LayerSource) -> tuple[bytes, int]:
        """The end of a layer with all of its table of contents, and the size of the blob."""
        blob = self._registry.blob(
            source.reference,
            source.digest,
            source.size,
            hurried=True,
            checked=bool(oci.toc_promise(source.annotations)),
        )
        tail = await blob.tail(_tail_length(source))
        data = tail.data
        location = identify(data, tail.size, source.annotations, source.media_type or "")
        start = tail.size - len(data)
        if start - location.offset > _TOC_MOST:
            raise NotLazy("the layer's table of contents is too large", reason="too-big")
        if location.offset < start:
            data = await blob.read(location.offset, start - location.offset) + data
        return data, tail.size

    @contextmanager
    def _in_time(self, source: LayerSource, size: int = 0) -> Iterator[None]:
        """Let the registry take only so long: a client waits that can download the layer instead.

        Args:
            source: of the layer.
            size: of what is asked for, in bytes; what is large may take longer, as layers share a line.
        """
        seconds = self._registry.exchange.settings.open_seconds
        seconds += max(size - _TAIL_LEAST, 0) / _OPENING_RATE
        began = trio.current_time()
        with trio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            why = f"{source.reference.host} has not sent its table of contents within {seconds:g} s"
            self._registry.note_failure(source.reference, why, since=began)
            raise RegistryUnreachable(
                f"layer {source.digest}: {why}", hint="the layer is downloaded and unpacked instead"
            )

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


def may_be_lazy(annotations: Mapping[str, str], *, allow_unverified: bool) -> bool:
    """Whether a layer's descriptor leaves it possible that the layer is opened.

    Args:
        annotations: all of its annotations.
        allow_unverified: as for `Opener`.
    """
    return allow_unverified or bool(oci.toc_promise(annotations))


def _tail_length(source: LayerSource) -> int:
    """How many bytes of the end of a blob are asked for, in the hope for all of the table of contents."""
    if source.size is None:
        return _TAIL_UNKNOWN
    return min(max(source.size // _TAIL_SHARE, _TAIL_LEAST), _TAIL_MOST)


def _refuse_encrypted(source: LayerSource) -> None:
    if oci.layer_kind(source.media_type or "") is oci.LayerKind.ENCRYPTED:
        raise NotLazy("the layer is encrypted", reason="encrypted")
