# SPDX-License-Identifier: Apache-2.0
"""Start-up profiles: which ranges of which files an image reads while it starts, in which order.

A profile names files by layer and path, not by chunks, so that it fits any form of the layer. It is
advice: nothing is trusted because a profile names it, and what it names wrongly is skipped. Pure.

Stored as JSON: `{"version": 1, "manifest": digest, "command": [..], "layers": {digest: [[path, offset,
length, milliseconds], ..]}}`, the reads of each layer in the order of their times.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec

from lazysnap.errors import FormatError
from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.members import filled, of_range
from lazysnap.index.reader import LayerIndex

VERSION = 1
ARTIFACT_TYPE = "application/vnd.lazysnap.profile.v1+json"
MAX_SIZE = 8 << 20
# A gap in the blob that is smaller than this is fetched too: what lies in it takes less of the CPU's time
# to decode and to store than another request. Not a larger one: several requests are under way at once, so
# that another one costs no round trip, and bytes are what the start waits for.
_GAP = 24 << 10
# Reads of one file that follow each other later than this are not joined: the end of a long file is
# not needed when its beginning is.
_TOGETHER_MS = 1000
# So many compressed bytes that are needed one after the other are put in the order of the blob: they
# arrive together anyway, and make fewer and larger requests.
_BATCH = 8 << 20


# Two of them can be added and still be packed by msgpack.
_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Read(msgspec.Struct, array_like=True, frozen=True):
    """A range of a file that was read; sizes in bytes."""

    path: str
    offset: _Number
    length: _Number
    at_ms: _Number


class Profile(msgspec.Struct, kw_only=True, frozen=True):
    """The reads of an image while it started.

    Attributes:
        manifest: digest of the platform's manifest.
        command: that was run; empty if it is not known.
        layers: the reads, by layer digest.
    """

    version: int = VERSION
    manifest: str
    command: list[str] = []
    layers: dict[str, list[Read]] = {}

    def size(self) -> int:
        """Bytes that were read."""
        return sum(read.length for reads in self.layers.values() for read in reads)


def parse(data: bytes) -> Profile:
    """Read a stored profile.

    Raises:
        FormatError: it is not one.
    """
    if len(data) > MAX_SIZE:
        raise FormatError(f"a profile of {len(data)} bytes is too large", reason="bad-profile")
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not a profile: {error}", reason="bad-profile") from error
    if profile.version != VERSION:
        raise FormatError(f"profile of version {profile.version}", reason="bad-profile")
    return profile


def serialize(profile: Profile) -> bytes:
    """The form that `parse` reads; of one that is too large, as many of the first reads as fit."""
    data = msgspec.json.encode(profile)
    while len(data) > MAX_SIZE:
        times = sorted(read.at_ms for reads in profile.layers.values() for read in reads)
        if not times:
            raise FormatError("a profile of no reads is too large", reason="bad-profile")
        # A little fewer than should fit, as sizes of reads differ.
        keep = len(times) * MAX_SIZE * 9 // (len(data) * 10)
        profile = _until(profile, times[keep], keep)
        data = msgspec.json.encode(profile)
    return data


def _until(profile: Profile, end_ms: int, most: int) -> Profile:
    """The first reads of a profile, before `end_ms` or if all are at once, just so many."""
    layers: dict[str, list[Read]] = {}
    for digest, reads in profile.layers.items():
        kept = [read for read in reads if read.at_ms < end_ms]
        if kept:
            layers[digest] = kept
    if not layers:
        for digest, reads in profile.layers.items():
            if kept := reads[:most]:
                layers[digest] = kept
                most -= len(kept)
    return msgspec.structs.replace(profile, layers=layers)


def merge(first: Profile, second: Profile) -> Profile:
    """The union of two profiles of an image; where both have a read, the earlier time counts."""
    layers = dict(first.layers)
    for digest, reads in second.layers.items():
        layers[digest] = coalesce([*layers.get(digest, ()), *reads])
    return Profile(manifest=first.manifest, command=first.command, layers=layers)


def coalesce(reads: Iterable[Read]) -> list[Read]:
    """Join the ranges of each file that overlap, or touch about the same time; order by time."""
    by_path: dict[str, list[Read]] = {}
    for read in reads:
        if read.length > 0:
            by_path.setdefault(read.path, []).append(read)
    joined = []
    for path, ranges in by_path.items():
        ranges.sort(key=lambda read: (read.offset, read.at_ms))
        begin = end = ranges[0].offset
        at = latest = ranges[0].at_ms
        for read in ranges:
            beyond = read.offset + read.length
            together = abs(read.at_ms - latest) <= _TOGETHER_MS
            if read.offset > end or (beyond > end and not together):
                joined.append(Read(path, begin, end - begin, at))
                begin = end = max(end, read.offset)
                at = read.at_ms
            if beyond > end:
                end, latest = beyond, read.at_ms
            at = min(at, read.at_ms)
        joined.append(Read(path, begin, end - begin, at))
    return sorted(joined, key=lambda read: (read.at_ms, read.path, read.offset))


def plan(index: LayerIndex, found: Iterable[tuple[int, Read]]) -> Plan:
    """The members that reads of a layer need, in the order in which they are needed.

    Those that are needed one soon after the other are put in the order of the blob, with small gaps
    filled, so that few requests bring them.

    Args:
        index: of the layer.
        found: the reads, as `locate` returns them.
    """
    first_need: dict[int, int] = {}
    for node, read in found:
        for number in of_range(index, node, read.offset, read.length):
            first_need[number] = min(first_need.get(number, read.at_ms), read.at_ms)
    wanted: dict[int, float] = {}
    batch: list[int] = []
    size = started = 0
    for number, at in sorted(first_need.items(), key=lambda item: (item[1], item[0])):
        if size > _BATCH:
            _close(index, batch, started, wanted)
            batch, size = [], 0
        if not batch:
            started = at
        batch.append(number)
        member = index.member(number)
        size += member.blob_end - member.blob_offset
    _close(index, batch, started, wanted)
    return Plan(list(wanted), wanted_at=list(wanted.values()))


def landmark_plan(index: LayerIndex) -> Plan | None:
    """The members before the layer's prefetch landmark, in the order of the blob."""
    if not index.prefetch_end:
        return None
    members = range(index.member_count)
    end = bisect_left(members, index.prefetch_end, key=lambda n: index.member(n).blob_offset)
    return Plan(members[:end])


def _close(index: LayerIndex, batch: list[int], at: int, wanted: dict[int, float]) -> None:
    """Append a batch in the order of the blob, filling small gaps."""
    for number in filled(index, sorted(batch), _GAP):
        wanted.setdefault(number, at)


def locate(index: LayerIndex, reads: Iterable[Read]) -> list[tuple[int, Read]]:
    """The files that some reads are of, with these reads, which are joined and in the order of need.

    Without reads of what the layer does not have.
    """
    directories: dict[str, int] = {}
    found = []
    # Joined again, so that a forged profile cannot name the same range a million times.
    for read in coalesce(reads):
        end = read.path.rfind("/") + 1
        directory = directories.get(read.path[:end])
        if directory is None:
            directory = directories[read.path[:end]] = _walk(index, read.path[:end])
        node = -1 if directory < 0 else index.lookup(directory, read.path[end:].encode())
        if node >= 0:
            attributes = index.attributes(node)
            if stat.S_ISREG(attributes.mode) and read.offset < attributes.size:
                found.append((node, read))
    return found


def _walk(index: LayerIndex, path: str) -> int:
    """The directory of a path that is empty or ends with a slash; -1 if there is none."""
    node = 0
    for name in path.encode().split(b"/")[:-1]:
        node = index.lookup(node, name)
        if node < 0:
            break
    return node


def from_reads(
    manifest: str, command: Sequence[str], layers: Mapping[str, Iterable[Read]]
) -> Profile:
    """A profile of what was recorded."""
    # str(): msgspec encodes no subclasses of it
    joined = {str(digest): coalesce(reads) for digest, reads in layers.items()}
    return Profile(
        manifest=str(manifest),
        command=list(command),
        layers={digest: reads for digest, reads in joined.items() if reads},
    )
