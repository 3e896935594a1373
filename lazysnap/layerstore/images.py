# SPDX-License-Identifier: Apache-2.0
"""Which layer of which image a client asks for, with manifests that are kept for a short time.

A client asks for all layers of an image, one after the other, and means the manifest that it has just
got. So a manifest that does not have the layer is got anew, as a tag may have moved.
"""

from __future__ import annotations

import platform as machine
from dataclasses import dataclass

import trio

from lazysnap.errors import LazysnapError, NotFound
from lazysnap.layerstore.information import position
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.image import Image
from lazysnap.snapshotter.locks import KeyLocks

_KEPT_SECONDS = 120.0
# An image whose layers are not in it is not asked for again and again.
_AGAIN_SECONDS = 1.0
_MOST = 100


@dataclass
class _Kept:
    """An image, or why there is none, and since when."""

    answer: Image | LazysnapError
    since: float


class Images:
    """The images that clients ask for.

    Args:
        registry: client.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._platform = Platform.parse(f"linux/{machine.machine()}")
        self._kept: dict[str, _Kept] = {}
        self._locks = KeyLocks()

    async def find(self, reference: Reference, digest: str) -> tuple[Image, int]:
        """An image and the number of the layer in it, from 0.

        Args:
            reference: of the image.
            digest: of the layer's blob or of its table of contents.

        Raises:
            NotFound: the image has no such layer.
            LazysnapError: the image cannot be had.
        """
        async with self._locks.hold(reference.name):
            kept = self._kept.get(reference.name)
            age = float("inf") if kept is None else trio.current_time() - kept.since
            if kept is not None and age < _KEPT_SECONDS:
                number = _position(kept.answer, digest)
                if isinstance(kept.answer, Image) and number is not None:
                    return kept.answer, number
            if kept is None or age >= _AGAIN_SECONDS:
                kept = await self._fetch(reference)
        if isinstance(kept.answer, LazysnapError):
            raise kept.answer
        number = _position(kept.answer, digest)
        if number is None:
            raise NotFound(f"{reference} has no layer {digest} for {self._platform}")
        return kept.answer, number

    async def _fetch(self, reference: Reference) -> _Kept:
        answer: Image | LazysnapError
        try:
            answer = await self._registry.fetch_image(reference, self._platform)
        except LazysnapError as error:
            answer = error
        self._kept.pop(reference.name, None)
        while len(self._kept) >= _MOST:
            del self._kept[next(iter(self._kept))]
        kept = self._kept[reference.name] = _Kept(answer, trio.current_time())
        return kept


def _position(answer: Image | LazysnapError, digest: str) -> int | None:
    return None if isinstance(answer, LazysnapError) else position(answer.manifest, digest)
