# SPDX-License-Identifier: Apache-2.0
"""Layer blobs from a registry into containerd's content store, a few at a time.

`Downloads` fetches the layers it is told to, lowest first, each blob once; a download that turns out
to be unneeded can be called off. A failure is kept until somebody waits for that layer, because a
layer that becomes lazy is not needed at all. Does not decide which layers are needed.

Invariant: when the nursery has ended, every ingest begun here is complete or aborted.
"""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lazysnap import log
from lazysnap.containerd.content import CHUNK, Content, Writer
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, DigestMismatch, LazysnapError
from lazysnap.oci import Descriptor
from lazysnap.pull.local_unpack import Tap
from lazysnap.pull.metadata import Labeller
from lazysnap.pull.progress import LayerState, Progress
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry

_log = log.get(__name__)

PARALLEL = 3
"""Downloads at a time, as in containerd's clients."""


@dataclass
class _Download:
    layer: int
    descriptor: Descriptor
    wanted: Callable[[], Awaitable[bool]] | None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    stored: bool = False
    started: bool = False
    tap: Tap | None = None
    error: LazysnapError | None = None


class Downloads:
    """The downloads of one pull.

    Args:
        nursery: where they run.
        content: containerd's content store, with the pull's lease.
        registry: where layers come from.
        reference: the image.
        labeller: says where blobs come from.
        progress: told about each layer.

    Attributes:
        bytes_received: from the registry, of all layers.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        content: Content,
        registry: Registry,
        reference: Reference,
        *,
        labeller: Labeller,
        progress: Progress,
    ) -> None:
        self.bytes_received = 0
        self._nursery = nursery
        self._content = content
        self._registry = registry
        self._reference = reference
        self._labeller = labeller
        self._progress = progress
        self._downloads: dict[Digest, _Download] = {}
        self._queue: list[tuple[int, Digest]] = []
        self._workers = 0

    def start(
        self,
        layer: int,
        descriptor: Descriptor,
        wanted: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Fetch a layer unless that is under way or done.

        Args:
            layer: its number; lower ones are fetched first.
            descriptor: its blob.
            wanted: asked just before the download whether it is still needed.
        """
        known = self._downloads.get(descriptor.digest)
        if known is not None and (known.stored or not known.done.is_set()):
            if wanted is None:
                known.wanted = None
            return
        self._downloads[descriptor.digest] = _Download(layer, descriptor, wanted)
        heapq.heappush(self._queue, (layer, descriptor.digest))
        if self._workers < PARALLEL:
            self._workers += 1
            self._nursery.start_soon(self._work)

    def tap(self, layer: int, descriptor: Descriptor) -> Tap | None:
        """The bytes of a download that has not begun; None if it has.

        The download waits for whoever has the tap, until that is stopped.
        """
        self.start(layer, descriptor)
        download = self._downloads[descriptor.digest]
        if download.started or download.done.is_set() or download.tap is not None:
            return None
        download.tap = Tap()
        return download.tap

    async def wait(self, layer: int, descriptor: Descriptor) -> None:
        """Return when a layer is in the content store; starts its download if need be.

        Raises:
            LazysnapError: the download failed.
        """
        while True:
            self.start(layer, descriptor)
            download = self._downloads[descriptor.digest]
            await download.done.wait()
            if download.error is not None:
                raise download.error
            if download.stored:
                return

    def call_off(self, digest: Digest) -> None:
        """Stop the download of a blob that is not needed; its ingest is aborted."""
        download = self._downloads.get(digest)
        if download is not None:
            download.scope.cancel()

    async def _work(self) -> None:
        while self._queue:
            _, digest = heapq.heappop(self._queue)
            download = self._downloads[digest]
            try:
                with download.scope:
                    await self._run(download)
            except LazysnapError as error:
                _log.debug("download failed", layer=digest, error=error)
                download.error = error
            finally:
                if download.tap is not None:
                    download.tap.end()
                download.done.set()
        self._workers -= 1

    async def _run(self, download: _Download) -> None:
        if download.wanted is not None and not await download.wanted():
            return
        download.started = True
        resumed = await self._fetch(download, fresh=False)
        if resumed is not None:
            # What an earlier pull left behind was at fault, or the registry: a try from 0 tells.
            _log.warning("begin a download again", layer=download.descriptor.digest, error=resumed)
            if download.tap is not None:
                download.tap.end()
            await self._fetch(download, fresh=True)
        download.stored = True

    async def _fetch(self, download: _Download, *, fresh: bool) -> DigestMismatch | None:
        """Download one blob; returns the mismatch if bytes of an earlier pull took part in it."""
        blob = download.descriptor
        resumed = False
        try:
            async with self._content.writer(
                f"layer-{blob.digest}", blob.digest, blob.size
            ) as writer:
                if writer.offset > blob.size or (fresh and writer.offset):
                    await writer.restart()
                resumed = writer.offset > 0
                await self._copy(download, writer)
                await writer.commit(self._labeller.source())
        except AlreadyExists:
            await self._labeller.add_source(blob.digest)
        except DigestMismatch as mismatch:
            if not resumed:
                raise
            return mismatch
        return None

    async def _copy(self, download: _Download, writer: Writer) -> None:
        blob = download.descriptor
        self._progress.state(download.layer, LayerState.DOWNLOADING)
        self._progress.received(download.layer, writer.offset)
        if writer.offset == blob.size:
            return
        pending = bytearray()
        # One that is resumed is of no use to whoever unpacks it from its beginning.
        tap = download.tap if writer.offset == 0 else None
        async with self._registry.stream_blob(
            self._reference, blob.digest, blob.size, writer.offset
        ) as stream:
            async for piece in stream:
                self.bytes_received += len(piece)
                if tap is not None:
                    await tap.give(piece)
                pending += piece
                if len(pending) >= CHUNK:
                    await self._flush(download, writer, pending)
        await self._flush(download, writer, pending)

    async def _flush(self, download: _Download, writer: Writer, pending: bytearray) -> None:
        if pending:
            await writer.write(bytes(pending))
            pending.clear()
            self._progress.received(download.layer, writer.offset)
