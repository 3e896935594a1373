# SPDX-License-Identifier: Apache-2.0
"""Estimates from what was recorded: what was read of what was fetched, and what could be spared. Pure.

A *piece* is a member of the blob, which can only be fetched as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lazysnap.fetch.members import of_range
from lazysnap.fetch.scheduler import Priority
from lazysnap.fetch.trace import Fetched, Told, Waited
from lazysnap.index.reader import LayerIndex
from lazysnap.prefetch.profile import Read, coalesce, locate
from lazysnap.report.model import Layer, Savings, Use, Wait


def use(index: LayerIndex, told: Told, reads: Sequence[Read] | None) -> Use:
    """What became of what was fetched for a layer.

    Args:
        index: of the layer.
        told: what its worker said.
        reads: of a profile of the image; None if there is none.

    Raises:
        FormatError: the index is damaged, or another one than the worker has.
    """
    brought: dict[int, Fetched] = {}  # by the request that brought it first
    for event in told.fetched:
        if not event.failed:
            for number in range(event.first, event.last + 1):
                brought.setdefault(number, event)
    waited = _waited_for(index, told.waited, brought)
    touched = set(waited)
    read = sum(event.size for event in told.waited)
    if reads is not None:
        for node, each in locate(index, reads):
            touched.update(of_range(index, node, each.offset, each.length))
        read = sum(each.length for each in coalesce(reads))
    counts = {"hits": 0, "late": 0, "along": 0, "missed": 0, "before": 0}
    for number in touched:
        if number in waited:
            counts["late" if waited[number] else "missed"] += 1
        elif number in brought:
            on_demand = brought[number].priority == Priority.DEMAND
            counts["along" if on_demand else "hits"] += 1
        else:
            counts["before"] += 1
    unused = (
        _size(index, number)
        for number, event in brought.items()
        if number not in touched and event.priority != Priority.BACKGROUND and event.received
    )
    return Use(
        known=reads is not None,
        read=read,
        needed=sum(_size(index, number) for number in touched),
        unused=sum(unused),
        round_trips=sum(_for_an_answer(index, event, brought) for event in told.waited),
        **counts,
    )


def _size(index: LayerIndex, number: int) -> int:
    member = index.member(number)
    return member.blob_end - member.blob_offset


def _waited_for(
    index: LayerIndex, waits: Iterable[Waited], brought: dict[int, Fetched]
) -> dict[int, bool]:
    """The pieces that readers waited for, and whether these were being fetched ahead."""
    found: dict[int, bool] = {}
    for event in waits:
        for number, request in _awaited(index, event, brought):
            found.setdefault(number, request.priority != Priority.DEMAND)
    return found


def _awaited(
    index: LayerIndex, event: Waited, brought: dict[int, Fetched]
) -> Iterable[tuple[int, Fetched]]:
    """The pieces that a read waited for, each with the request that brought it."""
    last = min(event.offset + event.size, index.file(event.node).size) - 1
    chunks = range(index.chunk_at(event.node, event.offset), index.chunk_at(event.node, last) + 1)
    for number in {index.chunk(i).member for i in chunks}:
        request = brought.get(number)
        # The others were here before the reader came.
        if request is not None and (request.ended is None or request.ended > event.began):
            yield number, request


def _for_an_answer(index: LayerIndex, event: Waited, brought: dict[int, Fetched]) -> bool:
    """Whether a read had to wait until the registry answered a request that was made for it.

    What came along with the table of contents needs none.
    """
    requests = (request for _, request in _awaited(index, event, brought))
    return not event.ahead and any(request.received for request in requests)


def savings(
    layers: Sequence[Layer], waits: Sequence[Wait], round_trip: float, bandwidth: float
) -> Savings:
    """What a profile, or a conversion, could have spared.

    Args:
        layers: of the image.
        waits: of all of them.
        round_trip: seconds; 0 if it is not known.
        bandwidth: bytes per second; 0 if it is not known.
    """
    lazy = [layer for layer in layers if layer.slot is not None]
    needed = sum(layer.use.needed for layer in lazy)
    blobs = sum(layer.blob_bytes or 0 for layer in lazy)
    round_trips = sum(layer.use.round_trips for layer in lazy)
    known = bool(lazy) and all(layer.use.known for layer in lazy)
    return Savings(
        waits=len(waits),
        waited_seconds=covered((wait.at, wait.at + wait.seconds) for wait in waits),
        round_trip=round_trip,
        bandwidth=bandwidth,
        round_trips=round_trips,
        round_trips_seconds=round_trip * round_trips,
        transfer_seconds=needed / bandwidth if bandwidth else 0.0,
        unused_bytes=sum(layer.use.unused for layer in lazy if layer.use.known),
        coarse_bytes=sum(_coarse(layer) for layer in lazy),
        unpacked_bytes=sum(layer.disk_bytes or 0 for layer in layers if layer.slot is None),
        needed_share=needed / blobs if known and blobs else None,
    )


def _coarse(layer: Layer) -> int:
    """Needed bytes beyond those that were read, if all of the layer is compressed equally well."""
    if not layer.use.known or not layer.bytes or layer.blob_bytes is None:
        return 0
    return max(layer.use.needed - layer.use.read * layer.blob_bytes // layer.bytes, 0)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much time spans (begin, end) cover; where they overlap it is counted once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total
