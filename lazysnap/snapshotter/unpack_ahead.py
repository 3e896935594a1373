# SPDX-License-Identifier: Apache-2.0
"""Layers that the daemon will be asked for soon: unpacked while the client is still below them.

containerd asks for one layer after the other. So when the daemon begins with the first layer of an image
that it unpacks itself, it begins with those above, too: each in a directory that belongs to no snapshot,
without what lies below it. In its turn its files are renamed into the directory of its snapshot.

Nothing depends on it: what was not unpacked ahead is unpacked in its turn. And it is bounded: in number,
and in time, as all that belongs to an image goes when its last client has gone away, or has not asked for
a layer for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from lazysnap import log
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


class _Ahead:
    """One layer that is unpacked before its turn.

    Attributes:
        layer: which one.
        begun: it is not only waiting any more.
        done: `answer` or `error` is there; neither if it was stopped.
        target: the directory with its files.
        scope: what unpacks it, and then keeps its directory until it is cancelled.
    """

    def __init__(self, layer: LayerBlob) -> None:
        self.layer = layer
        self.begun = False
        self.done = trio.Event()
        self.answer: Answer | None = None
        self.error: LazysnapError | None = None
        self.target = ""
        self.scope = trio.CancelScope()


class Image:
    """The layers of one image that are unpacked ahead.

    Attributes:
        clients: how many requests for its layers are under way.
        begun: whether its layers are looked for, or more.
        asked: layers whose turn has come.
        layers: those that are unpacked ahead, until somebody takes them.
        scope: all that is done for it.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.begun = False
        self.asked: set[Digest] = set()
        self.layers: dict[Digest, _Ahead] = {}
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
        self._images: dict[str, Image] = {}
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to work; before this nothing is unpacked ahead.

        Args:
            nursery: where layers are unpacked.
        """
        self._nursery = nursery

    @contextmanager
    def client(self, labels: Mapping[str, str]) -> Iterator[Image]:
        """A client asks for a layer and waits in the body; it has gone away if that is cancelled.

        Args:
            labels: of its request.
        """
        key = labels.get(CRI_MANIFEST_DIGEST, "")
        image = self._images.setdefault(key, Image()) if key else Image()
        image.clients += 1
        image.scope.deadline = float("inf")
        gone = False
        try:
            yield image
        except BaseException as error:
            gone = not isinstance(error, Exception)  # cancelled, perhaps in a group
            raise
        finally:
            image.clients -= 1
            if not image.clients:
                image.scope.deadline = trio.current_time() + _PATIENCE_SECONDS
                if gone:
                    image.scope.cancel()
                if gone or not image.begun:
                    self._forget(key, image)

    def begin(self, image: Image, labels: Mapping[str, str]) -> None:
        """Unpack the layers above one that is about to be unpacked, unless that has begun.

        Args:
            image: from `client`.
            labels: of the request for the lower layer.
        """
        if self._nursery is not None and not image.begun and CRI_MANIFEST_DIGEST in labels:
            image.begun = True
            self._nursery.start_soon(self._run, image, labels)

    async def take(
        self, image: Image, layer: LayerBlob, target: str, lowers: Sequence[str]
    ) -> Answer | None:
        """Bring a layer to its place if it was unpacked ahead, or is being.

        Args:
            image: from `client`.
            layer: whose turn it is.
            target: its directory, which is empty.
            lowers: directories of the layers below, nearest first.

        Returns:
            What it is; None if it has to be unpacked now.

        Raises:
            LazysnapError: it cannot be unpacked here.
        """
        image.asked.add(layer.digest)
        ahead = image.layers.pop(layer.digest, None)
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

    async def _run(self, image: Image, labels: Mapping[str, str]) -> None:
        try:
            with image.scope:
                above = await self._unpacker.above(labels)
                image.layers = {
                    layer.digest: _Ahead(layer)
                    for layer in above
                    if layer.digest not in image.asked
                }
                async with trio.open_nursery() as nursery:
                    # The largest first: a container needs all of them, and they take longest.
                    largest = sorted(image.layers.values(), key=lambda each: -each.layer.size)
                    for ahead in largest:
                        if not ahead.scope.cancel_called:  # its turn has come already
                            await self._limit.acquire_on_behalf_of(ahead)
                            nursery.start_soon(self._keep, ahead)
        except LazysnapError as error:
            _log.debug("layers are not unpacked ahead", error=error)
        except Exception:  # a defect must not end the daemon
            _log.exception("unpacking layers ahead failed")
        finally:
            self._forget(labels[CRI_MANIFEST_DIGEST], image)

    def _forget(self, key: str, image: Image) -> None:
        if self._images.get(key) is image:
            del self._images[key]

    async def _keep(self, ahead: _Ahead) -> None:
        """Unpack a layer, and keep it until somebody has taken it."""
        with ahead.scope:
            try:
                with self._housekeeping.building() as directory:
                    await self._unpack(ahead, directory)
                    if ahead.error is None:
                        await trio.sleep_forever()
            finally:
                self._housekeeping.expect_garbage()
            await trio.sleep_forever()  # with the error, so that it is not tried again

    async def _unpack(self, ahead: _Ahead, directory: str) -> None:
        ahead.begun = True

        def build() -> str:
            return self._dirs.build(directory, work=False, parent_id=None)

        try:
            ahead.target = await trio.to_thread.run_sync(build)
            ahead.answer = await self._unpacker.unpack(ahead.layer, ahead.target, [], alone=True)
        except LazysnapError as error:
            _log.debug("a layer is not unpacked ahead", layer=ahead.layer.digest, error=error)
            ahead.error = error
        except Exception as error:
            _log.exception("unpacking a layer ahead failed")
            ahead.error = Internal(f"unpacking a layer ahead failed: {error}")
        finally:
            self._limit.release_on_behalf_of(ahead)
            ahead.done.set()
