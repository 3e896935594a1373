# SPDX-License-Identifier: Apache-2.0
"""Unpacks layers that the daemon will soon be asked for, while the client is still at layers below them.

containerd asks for one layer after the other. So when the daemon begins with the first layer of an image
that it unpacks itself, it begins with those above, too: each in a directory that belongs to no snapshot,
without what lies below it. When the layer is asked for, its files are renamed into the directory of its
snapshot.

Nothing depends on it: a layer that was not unpacked ahead is unpacked when it is asked for. It is bounded
in number, and in time: all that belongs to an image is removed when its last client has gone away, or
has not asked for a layer for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from lazysnap import log
from lazysnap.advice import advice
from lazysnap.digest import Digest
from lazysnap.errors import Internal, LazysnapError
from lazysnap.labels import CRI_MANIFEST_DIGEST
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.interfaces import LayerBlob, Unpacker
from lazysnap.unpack.aside import bring
from lazysnap.unpack.process import Answer
from lazysnap.unpack.tree import NEEDS_LOWER

_log = log.get(__name__)
AT_ONCE = 3
"""How many layers are unpacked ahead at the same time, of all images together."""
_PATIENCE_SECONDS = 30.0
"""How long a client may take between two layers: milliseconds, unless the disk is busy."""


class _PendingLayer:
    """One layer that is unpacked before it is asked for.

    Attributes:
        layer: which one.
        begun: whether unpacking has begun; until then the layer waits for others.
        done: set when `answer` or `error` is there; there is neither if it was stopped.
        target: the directory with its files.
        scope: of the task that unpacks it, and then keeps its directory until it is cancelled.
    """

    def __init__(self, layer: LayerBlob) -> None:
        self.layer = layer
        self.begun = False
        self.done = trio.Event()
        self.answer: Answer | None = None
        self.error: LazysnapError | None = None
        self.target = ""
        self.scope = trio.CancelScope()


class ImagePull:
    """The pull of one image, with its layers that are unpacked ahead.

    Attributes:
        clients: how many requests for layers of the image are under way.
        begun: whether the task that unpacks its layers ahead was started.
        asked: layers that a client has asked for.
        layers: those that are unpacked ahead, until a request takes them.
        scope: of all that is done ahead for the image.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.begun = False
        self.asked: set[Digest] = set()
        self.layers: dict[Digest, _PendingLayer] = {}
        self.scope = trio.CancelScope()


class UnpackAhead:
    """Unpacks layers before their snapshots are asked for.

    Args:
        directories: of the root.
        housekeeping: collects directories that come to nothing.
        unpacker: downloads and unpacks layers.
    """

    def __init__(
        self, directories: Directories, housekeeping: Housekeeping, unpacker: Unpacker
    ) -> None:
        self._dirs = directories
        self._housekeeping = housekeeping
        self._unpacker = unpacker
        self._limit = trio.CapacityLimiter(AT_ONCE)
        self._pulls: dict[str, ImagePull] = {}
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to work; before this nothing is unpacked ahead.

        Args:
            nursery: where layers are unpacked.
        """
        self._nursery = nursery

    @contextmanager
    def client(self, labels: Mapping[str, str]) -> Iterator[ImagePull]:
        """A client asks for a layer and waits in the body; it has gone away if the body is cancelled.

        Args:
            labels: of its request.
        """
        key = labels.get(CRI_MANIFEST_DIGEST, "")
        pull = self._pulls.setdefault(key, ImagePull()) if key else ImagePull()
        pull.clients += 1
        pull.scope.deadline = float("inf")
        gone = False
        try:
            yield pull
        except BaseException as error:
            gone = not isinstance(error, Exception)  # cancelled, perhaps in a group
            raise
        finally:
            pull.clients -= 1
            if not pull.clients:
                pull.scope.deadline = trio.current_time() + _PATIENCE_SECONDS
                if gone:
                    pull.scope.cancel()
                if gone or not pull.begun:
                    self._forget(key, pull)

    def begin(self, pull: ImagePull, labels: Mapping[str, str]) -> None:
        """Unpack the layers above one that is about to be unpacked, unless that has begun.

        Args:
            pull: from `client`.
            labels: of the request for the lower layer.
        """
        if self._nursery is not None and not pull.begun and CRI_MANIFEST_DIGEST in labels:
            pull.begun = True
            self._nursery.start_soon(self._run, pull, labels)

    async def take(
        self, pull: ImagePull, layer: LayerBlob, target: str, lowers: Sequence[str]
    ) -> Answer | None:
        """Bring a layer to its place if it was unpacked ahead, or is being.

        Args:
            pull: from `client`.
            layer: which one is asked for.
            target: its directory, which is empty.
            lowers: directories of the layers below, nearest first.

        Returns:
            What was unpacked; None if the layer has to be unpacked now.

        Raises:
            LazysnapError: it cannot be unpacked here.
        """
        pull.asked.add(layer.digest)
        ahead = pull.layers.pop(layer.digest, None)
        if ahead is None:
            return None
        try:
            if not ahead.begun or ahead.layer != layer:
                return None
            await ahead.done.wait()
            if ahead.error is not None and ahead.error.reason != NEEDS_LOWER:
                raise ahead.error
            if ahead.answer is None:
                return None
            place = partial(
                bring,
                ahead.target,
                target,
                lowers=lowers,
                left_out=ahead.answer.left_out,
                whiteouts=self._unpacker.whiteouts,
            )
            await trio.to_thread.run_sync(place)
            return ahead.answer
        finally:
            ahead.scope.cancel()

    async def _run(self, pull: ImagePull, labels: Mapping[str, str]) -> None:
        try:
            with advice(_log, "layers are not unpacked ahead"), pull.scope:
                above = await self._unpacker.above(labels)
                pull.layers = {
                    layer.digest: _PendingLayer(layer)
                    for layer in above
                    if layer.digest not in pull.asked
                }
                async with trio.open_nursery() as nursery:
                    # The largest first: a container needs all of them, and they take longest.
                    largest = sorted(pull.layers.values(), key=lambda ahead: -ahead.layer.size)
                    for ahead in largest:
                        if not ahead.scope.cancel_called:  # it was asked for already
                            await self._limit.acquire_on_behalf_of(ahead)
                            nursery.start_soon(self._keep, ahead)
        finally:
            self._forget(labels[CRI_MANIFEST_DIGEST], pull)

    def _forget(self, key: str, pull: ImagePull) -> None:
        if self._pulls.get(key) is pull:
            del self._pulls[key]

    async def _keep(self, ahead: _PendingLayer) -> None:
        """Unpack a layer, and keep it until a request has taken it."""
        with ahead.scope:
            try:
                with self._housekeeping.building() as directory:
                    await self._unpack(ahead, directory)
                    if ahead.error is None:
                        await trio.sleep_forever()
            finally:
                self._housekeeping.expect_garbage()
            await trio.sleep_forever()  # keeps the error, so that the layer is not tried again

    async def _unpack(self, ahead: _PendingLayer, directory: str) -> None:
        ahead.begun = True

        def build() -> str:
            return self._dirs.build(directory, work=False, parent_id=None)

        try:
            ahead.target = await trio.to_thread.run_sync(build)
            ahead.answer = await self._unpacker.unpack(ahead.layer, ahead.target, [], alone=True)
        # Not `advice`: the request for the layer gets the error.
        except LazysnapError as error:
            _log.debug("a layer is not unpacked ahead", layer=ahead.layer.digest, error=error)
            ahead.error = error
        except Exception as error:
            _log.exception("unpacking a layer ahead failed")
            ahead.error = Internal(f"unpacking a layer ahead failed: {error}")
        finally:
            self._limit.release_on_behalf_of(ahead)
            ahead.done.set()
