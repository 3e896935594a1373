# SPDX-License-Identifier: Apache-2.0
"""What is known of the start of an image, as values; `lazysnap report --json` prints them. Pure.

Times are seconds since `Report.zero`, sizes bytes. Names come from layers, so they may hold anything;
where they were not UTF-8, or cannot be printed, they are escaped.
"""

from __future__ import annotations

import msgspec


class Range(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """A range of a blob that was fetched.

    Attributes:
        layer: position of the layer in the image, from the bottom.
        file: the first file that it holds a part of.
        files: names of others in it, not more than twenty.
        more_files: how many beside `file` there are.
        kind: demand, prefetch or background, as it was begun.
        urgent: a reader came to wait for it, though it was fetched ahead.
        at: when it was asked for.
        seconds: until it was stored.
        under_way: it is not complete yet.
        offset: in the blob.
        length: of the blob.
        received: bytes that came over the network; the rest was here.
        failed: not all of it arrived.
    """

    layer: int
    file: str
    files: list[str] = []
    more_files: int = 0
    kind: str
    urgent: bool = False
    at: float
    seconds: float
    under_way: bool = False
    offset: int
    length: int
    received: int
    failed: bool = False


class Wait(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """A read that had to wait for bytes.

    Attributes:
        layer: position of the layer.
        file: that was read.
        offset: in the file.
        length: of the read.
        at: when it began to wait.
        seconds: how long it waited.
        ahead: the bytes were being fetched ahead, but too late.
    """

    layer: int
    file: str
    offset: int
    length: int
    at: float
    seconds: float
    ahead: bool


class Slow(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """A file that held readers up; the waits of one file are added up."""

    layer: int
    file: str
    waits: int
    seconds: float
    bytes: int


class Use(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """What became of what was fetched for one layer.

    Attributes:
        known: what was read is known, from a profile; else only the reads that waited are.
        read: bytes of files that were read.
        needed: compressed bytes of the pieces that these are in.
        unused: compressed bytes that were fetched on demand or by prefetch, and not read.
        hits: pieces that were read, and had been fetched ahead in time.
        late: pieces that were being fetched ahead when a reader came for them.
        along: pieces that were read, and came along with a request for others.
        missed: pieces that nobody had asked for when a reader came.
        before: pieces that were read, and had been here before the worker was started.
        round_trips: reads that waited for the registry to answer a request for them.
    """

    known: bool = False
    read: int = 0
    needed: int = 0
    unused: int = 0
    hits: int = 0
    late: int = 0
    along: int = 0
    missed: int = 0
    before: int = 0
    round_trips: int = 0


class Layer(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """A layer of the image.

    Attributes:
        digest: of the blob; empty if it is not known.
        slot: what serves it; None if it is not lazy.
        reason: why it is not lazy.
        mounting_at: when its mounting began, as far as the disk tells; None if it is not known.
        ready_at: when its snapshot was there; None if it is not known.
        blob_bytes: of the blob; None if it is not known.
        bytes: of all its files; None if it is not known.
        local_bytes: of them, what is local.
        disk_bytes: what it takes on disk if it was unpacked.
        fetched_bytes: over the network, since its worker was started.
        requests: since its worker was started.
        use: what became of them.
    """

    digest: str
    slot: int | None = None
    reason: str = ""
    mounting_at: float | None = None
    ready_at: float | None = None
    blob_bytes: int | None = None
    bytes: int | None = None
    local_bytes: int | None = None
    disk_bytes: int | None = None
    fetched_bytes: int | None = None
    requests: int | None = None
    use: Use = Use()


class Container(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """A snapshot above the image: a container's, in most cases."""

    key: str
    at: float


class Savings(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """What waiting and fetching could have been spared. Estimates, from what was recorded.

    Attributes:
        waits: reads that waited.
        waited_seconds: during which some read waited; those at the same time are counted once.
        round_trip: seconds to the first byte of an answer of the registry; 0 if it is not known.
        bandwidth: bytes per second while something arrives; 0 if it is not known.
        round_trips: reads that waited for the registry to answer a request for them.
        round_trips_seconds: that many times the round trip.
        transfer_seconds: what all needed bytes take at that bandwidth; 0 if it is not known.
        unused_bytes: fetched and not read.
        coarse_bytes: needed only as pieces are larger than what is read of them.
        unpacked_bytes: what layers that are not lazy take on disk.
        needed_share: of the blobs of lazy layers, what was needed; None if it is not known.
    """

    waits: int = 0
    waited_seconds: float = 0.0
    round_trip: float = 0.0
    bandwidth: float = 0.0
    round_trips: int = 0
    round_trips_seconds: float = 0.0
    transfer_seconds: float = 0.0
    unused_bytes: int = 0
    coarse_bytes: int = 0
    unpacked_bytes: int = 0
    needed_share: float | None = None


class Report(msgspec.Struct, kw_only=True, frozen=True, rename="camel"):
    """Everything.

    Attributes:
        image: its reference.
        root: lazysnap's root directory.
        zero: the time from which all others are counted, in seconds since 1970.
        made_at: when this was found out.
        layers: bottom first.
        containers: on the image, by time.
        ranges: by time.
        waits: by time.
        slowest: files by the time they held readers up, longest first.
        savings: estimates.
        missing: what is not known, and why; sentences for people.
    """

    image: str
    root: str
    zero: float
    made_at: float
    layers: list[Layer]
    containers: list[Container] = []
    ranges: list[Range] = []
    waits: list[Wait] = []
    slowest: list[Slow] = []
    savings: Savings = Savings()
    missing: list[str] = []


def printable(name: bytes | str) -> str:
    """A name as it can be shown: what is not UTF-8 or has no shape of its own is escaped."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
