# SPDX-License-Identifier: Apache-2.0
"""Follows what programs link to: their libraries are fetched before the dynamic linker asks for them.

The linker opens one library after the other, and waits for a round trip at each. But a file's dynamic
section names them, so as soon as a program or a library is read, all that it needs can be fetched at once,
and what that needs, and so on. Where a library lies is looked up in the trees of the image's layers as
ld.so(8) would find it, but for its cache and its configuration. A wrong find costs some bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from lazysnap.errors import FormatError
from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.layer_reader import LayerReader
from lazysnap.fetch.members import of_range
from lazysnap.fetch.scheduler import Priority
from lazysnap.formats import elf
from lazysnap.formats.elf import Span
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.links import Steps, TooManySteps
from lazysnap.prefetch.guesser import Guess, wanted_at
from lazysnap.prefetch.overlay_lookup import Found, OverlayTree
from lazysnap.prefetch.queue import PrefetchQueue

# Of a larger library only what is needed to load it is fetched.
_WHOLE = 16 << 20
_DIRECTORIES = (b"/lib", b"/usr/lib", b"/lib64", b"/usr/lib64", b"/usr/local/lib")
_PATH_MOST = 4096
# Directories of its own that a file can have us search.
_OWN_MOST = 64
# Whoever made them, one file can have us search so much, and all files of an image. A usual program
# takes some hundred steps.
_STEPS_MOST = 10_000
_IMAGE_STEPS_MOST = 300_000
# After so many steps all other threads of the process get a chance.
_REST_AFTER = 64
_REST_SECONDS = 1e-4
_LINKER_CACHE = b"/etc/ld.so.cache"
_EXECUTABLE = 0o111
# One search at a time, in a thread that nothing else needs.
_SEARCHES = trio.CapacityLimiter(1)


class Bytes(Protocol):
    """Fetches parts of one layer's files ahead of everybody."""

    async def fetch(self, node: int, span: Span) -> None:
        """Fetch a range of a file, less urgently than any reader."""
        ...

    async def read(self, node: int, span: Span) -> bytes:
        """Fetch a range of a file likewise, and return it.

        Raises:
            LazysnapError: it cannot be had.
        """
        ...


class BytesAhead:
    """`Bytes` of a layer that is served by this process.

    Args:
        reader: of the layer.
        ahead: of the process.
    """

    def __init__(self, reader: LayerReader, ahead: PrefetchQueue) -> None:
        self._reader = reader
        self._ahead = ahead

    async def fetch(self, node: int, span: Span) -> None:
        """Fetch a range of a file, less urgently than any reader."""
        members = sorted(set(of_range(self._reader.index, node, span.offset, span.size)))
        plan = Plan(members, wanted_at=wanted_at(Guess.LINKED, len(members)))
        await self._ahead.add(self._reader.fetcher, plan, Priority.PREFETCH).wait()

    async def read(self, node: int, span: Span) -> bytes:
        """Fetch a range of a file likewise, and return it."""
        await self.fetch(node, span)
        return await self._reader.read(node, span.offset, span.size)


@dataclass(frozen=True)
class Image:
    """The layers of an image.

    Attributes:
        slots: of the layers, the uppermost first.
        indexes: of the layers.
    """

    slots: Sequence[int]
    indexes: Sequence[LayerIndex]


def may_link(index: LayerIndex, node: int) -> bool:
    """Whether a regular file may be a program or a library, by its name and mode."""
    return b".so" in index.name(node) or bool(index.attributes(node).mode & _EXECUTABLE)


class _Search(Steps):
    """The budget of one file, in a thread that takes no more of the interpreter than it must.

    Args:
        image: the budget of the image.
    """

    def __init__(self, image: Steps) -> None:
        super().__init__(_STEPS_MOST)
        self._image = image
        self._rest_at = self.left - _REST_AFTER

    def take(self, count: int = 1) -> None:
        """Use up steps of the file, and of the image."""
        super().take(count)
        self._image.take(count)
        if self.left <= self._rest_at:
            self._rest_at = self.left - _REST_AFTER
            time.sleep(_REST_SECONDS)


class Libraries:
    """Follows files of one image.

    Args:
        image: which.
        want: has a file fetched and followed, by whoever serves its layer: of a slot, a node.
    """

    def __init__(self, image: Image, want: Callable[[int, int], object]) -> None:
        self._image = image
        self._want = want
        self._tree = OverlayTree(image.indexes)
        self._steps = Steps(_IMAGE_STEPS_MOST)
        self._directories: list[bytes] | None = None

    async def follow(self, slot: int, node: int, source: Bytes) -> None:
        """Fetch what loading a file reads of it, and have fetched what it links to.

        Args:
            slot: of its layer, which is one of the image.
            node: of the file, which may be anything.
            source: of the layer.

        Raises:
            LazysnapError: a part of it cannot be had.
        """
        index = self._image.indexes[self._image.slots.index(slot)]
        size = index.file(node).size
        try:
            head = elf.parse_head(await source.read(node, Span(0, min(size, elf.HEAD_SIZE))))
        except FormatError:
            return
        if head.interpreter is not None and head.interpreter.size <= _PATH_MOST:
            linker = await source.read(node, head.interpreter)
            await self._search(partial(self._find, [linker.rstrip(b"\0"), _LINKER_CACHE]))
        if head.dynamic is None:
            return
        try:
            dynamic = elf.parse_dynamic(head, await source.read(node, head.dynamic))
        except FormatError:
            return
        if dynamic is not None:
            strings = await source.read(node, dynamic.strings)
            await self._search(partial(self._needed, index.path(node), dynamic, strings))
        for span in [Span(0, size)] if size <= _WHOLE else head.writable:
            await source.fetch(node, Span(span.offset, min(span.size, _WHOLE)))

    async def _search(self, search: Callable[[Steps], Iterator[Found | None]]) -> None:
        """Have what is found fetched. In a thread: nobody must wait for a file that needs much."""

        def find() -> list[Found]:
            found: list[Found] = []
            # What was found within the budget counts.
            with contextlib.suppress(TooManySteps):
                found.extend(filter(None, search(_Search(self._steps))))
            return found

        for found in await trio.to_thread.run_sync(find, limiter=_SEARCHES):
            self._want(self._image.slots[found.layer], found.node)

    def _find(self, paths: Sequence[bytes], steps: Steps) -> Iterator[Found | None]:
        for path in paths:
            yield self._tree.find_file(path, steps)

    def _needed(
        self, path: bytes, dynamic: elf.Dynamic, strings: bytes, steps: Steps
    ) -> Iterator[Found | None]:
        """Where the libraries are that a file needs."""
        own = b":".join(elf.string(strings, at) for at in dynamic.paths).split(b":", _OWN_MOST)
        expanded = [_expand(each, path.rpartition(b"/")[0]) for each in own[:_OWN_MOST]]
        directories = [*filter(None, expanded), *self._usual_directories(steps)]
        for at in dict.fromkeys(dynamic.needed):
            name = elf.string(strings, at)
            if len(name) > _PATH_MOST:
                return
            places = [name] if b"/" in name else [b"%s/%s" % (d, name) for d in directories]
            steps.take(len(places))
            found = (self._tree.find_file(place, steps) for place in places)
            yield next(filter(None, found), None)

    def _usual_directories(self, steps: Steps) -> list[bytes]:
        """Where libraries are looked for; directories of one architecture first."""
        if self._directories is None:
            several = [
                b"%s/%s" % (path, name)
                for path in _DIRECTORIES
                for name in sorted(self._tree.names(path, steps))
                if b"-linux-" in name
            ]
            self._directories = [*several, *_DIRECTORIES]
        return self._directories


def _expand(directory: bytes, origin: bytes) -> bytes:
    """A directory that a file names, with the place of the file; empty if that makes it too long."""
    if len(directory) > _PATH_MOST:
        return b""
    for word in (b"$ORIGIN", b"${ORIGIN}"):
        directory = directory.replace(word, origin)
    return directory if len(directory) <= _PATH_MOST else b""
