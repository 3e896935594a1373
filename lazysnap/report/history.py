# SPDX-License-Identifier: Apache-2.0
"""Gives names to what a worker has told of a layer: its members and nodes become files. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lazysnap.fetch.trace import Fetched, Told, Waited, label
from lazysnap.index.reader import LayerIndex
from lazysnap.report.model import Range, Slow, Wait, printable

_NAMES_MOST = 20
_SLOWEST_MOST = 50


class History:
    """What happened to one layer.

    Args:
        position: of the layer in the image.
        index: of the layer.
        zero: the time from which others are counted, by time.monotonic().
    """

    def __init__(self, position: int, index: LayerIndex, zero: float) -> None:
        self._position = position
        self._index = index
        self._zero = zero
        self._paths: dict[int, str] = {}

    def ranges(self, told: Told) -> list[Range]:
        """What was fetched.

        Raises:
            FormatError: the index is damaged, or another one than the worker has.
        """
        return [self._range(event, told.now) for event in told.fetched]

    def waits(self, told: Told) -> list[Wait]:
        """The reads that waited.

        Raises:
            FormatError: the index is damaged, or another one than the worker has.
        """
        return [self._wait(event) for event in told.waited]

    def _path(self, node: int) -> str:
        found = self._paths.get(node)
        if found is None:
            found = self._paths[node] = printable(self._index.path(node).lstrip(b"/"))
        return found

    def _range(self, event: Fetched, now: float) -> Range:
        nodes: dict[int, None] = {}  # ordered as in the blob
        for number in range(event.first, event.last + 1):
            for chunk in self._index.member_chunks(number):
                nodes[self._index.owner(chunk)] = None
        names = [self._path(node) for node in list(nodes)[: _NAMES_MOST + 1]]
        ended = now if event.ended is None else event.ended
        return Range(
            layer=self._position,
            file=names[0] if names else "",
            files=names[1:],
            more_files=max(len(nodes) - 1, 0),
            kind=label(event.priority),
            urgent=event.urgent < event.priority,
            at=event.began - self._zero,
            seconds=max(ended - event.began, 0.0),
            under_way=event.ended is None,
            offset=event.begin,
            length=event.end - event.begin,
            received=event.received,
            failed=event.failed,
        )

    def _wait(self, event: Waited) -> Wait:
        return Wait(
            layer=self._position,
            file=self._path(event.node),
            offset=event.offset,
            length=event.size,
            at=event.began - self._zero,
            seconds=event.seconds,
            ahead=event.ahead,
        )


def slowest(waits: Sequence[Wait]) -> list[Slow]:
    """The files that readers waited for longest, longest first."""
    found: dict[tuple[int, str], list[Wait]] = {}
    for wait in waits:
        found.setdefault((wait.layer, wait.file), []).append(wait)
    files = [
        Slow(
            layer=layer,
            file=file,
            waits=len(several),
            seconds=sum(wait.seconds for wait in several),
            bytes=sum(wait.length for wait in several),
        )
        for (layer, file), several in found.items()
    ]
    return sorted(files, key=lambda slow: -slow.seconds)[:_SLOWEST_MOST]
