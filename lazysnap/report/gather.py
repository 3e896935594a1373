# SPDX-License-Identifier: Apache-2.0
"""Finds out what happened to the layers of an image: asks their workers, and looks at the disk.

Needs no daemon. What cannot be had is left out, and why is said in the report. Changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from lazysnap.digest import Digest
from lazysnap.errors import LazysnapError
from lazysnap.fetch.trace import Told
from lazysnap.layers.slots import SlotRecord
from lazysnap.layers.view import open_index
from lazysnap.paths import Root
from lazysnap.prefetch.profile import MAX_SIZE, Profile, parse
from lazysnap.report.estimate import savings, use
from lazysnap.report.history import History, slowest
from lazysnap.report.model import Container, Layer, Range, Report, Use, Wait
from lazysnap.shard.client import connect
from lazysnap.store.records import Snapshot

_CALL_SECONDS = 30.0
# An index that was made longer before belongs to an earlier pull.
_INDEX_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """What a report is about.

    Attributes:
        root: lazysnap's root directory.
        image: as `lazysnap status --json` describes it.
        snapshots: all, by name.
        records: of the slots, by number.
        problems: what is not known so far.
    """

    root: str
    image: Mapping[str, Any]
    snapshots: Mapping[str, Snapshot]
    records: Mapping[int, SlotRecord]
    problems: Sequence[str] = ()


class _Findings:
    """What was found; times are still in seconds since 1970, or since `now` by the other clock."""

    def __init__(self) -> None:
        self.made_at = time.time()
        # Of the monotonic clock in the other's terms; set anew, if somebody sets the other.
        self.zero = time.monotonic() - self.made_at
        self.missing: list[str] = []
        self.ranges: list[Range] = []
        self.waits: list[Wait] = []
        self.round_trip = self.bandwidth = 0.0


async def gather(question: Question) -> Report:
    """Find out everything."""
    found = _Findings()
    found.missing += question.problems
    answers = await _ask_all(question, found.missing)
    return await trio.to_thread.run_sync(_assemble, question, answers, found)


async def _ask_all(question: Question, missing: list[str]) -> dict[int, Told]:
    """What the workers tell of the image's slots."""
    slots = [layer["slot"] for layer in question.image["layers"] if layer["slot"]]
    by_shard: dict[int, list[int]] = {}
    for slot in slots:
        if slot in question.records:
            by_shard.setdefault(question.records[slot].shard, []).append(slot)
    answers: dict[int, Told] = {}

    async def ask(shard: int, slots: list[int]) -> None:
        path = Root(question.root).shard_socket(shard)
        try:
            answer = await connect(path, timeout=_CALL_SECONDS).trace(slots)
            answers.update((each.slot, each) for each in answer)
        except LazysnapError as error:
            missing.append(f"Shard {shard} does not report its layers: {error}")

    async with trio.open_nursery() as nursery:
        for shard, mine in by_shard.items():
            nursery.start_soon(ask, shard, mine)
    return answers


def _assemble(question: Question, answers: Mapping[int, Told], found: _Findings) -> Report:
    """In a thread: names for all of it."""
    profile = _profile(question)
    layers = [
        _layer(question, position, described, answers=answers, profile=profile, found=found)
        for position, described in enumerate(question.image["layers"])
    ]
    _say_what_is_missing(question, layers, answers, profile, found)
    keys = {key for described in question.image["layers"] for key in described["usedBy"]}
    containers = [
        Container(key=key, at=question.snapshots[key].created_ns / 1e9)
        for key in keys
        if key in question.snapshots
    ]
    report = Report(
        image=question.image["reference"],
        root=question.root,
        zero=0.0,
        made_at=found.made_at,
        layers=layers,
        containers=sorted(containers, key=lambda each: each.at),
        ranges=sorted(found.ranges, key=lambda each: each.at),
        waits=sorted(found.waits, key=lambda each: each.at),
        slowest=slowest(found.waits),
        savings=savings(layers, found.waits, found.round_trip, found.bandwidth),
        missing=found.missing,
    )
    return from_zero(report)


def _profile(question: Question) -> Profile | None:
    """The profile of the image; none if there is none that can be read."""
    for layer in question.image["layers"]:
        record = question.records.get(layer["slot"] or 0)
        if record is None or not record.manifest:
            continue
        try:
            path = Root(question.root).profile(Digest.parse(record.manifest).hex)
            with open(path, "rb") as file:
                return parse(file.read(MAX_SIZE + 1))
        except (OSError, LazysnapError):
            continue
    return None


def _layer(
    question: Question,
    position: int,
    described: Mapping[str, Any],
    *,
    answers: Mapping[int, Told],
    profile: Profile | None,
    found: _Findings,
) -> Layer:
    snapshot = question.snapshots.get(described["snapshot"])
    ready = None if snapshot is None else snapshot.created_ns / 1e9
    record = question.records.get(described["slot"] or 0)
    if record is None:
        usage = None if snapshot is None else snapshot.usage
        return Layer(
            digest=described["layer"],
            reason=described["reason"],
            ready_at=ready,
            disk_bytes=None if usage is None else usage.size,
        )
    reads = None if profile is None else profile.layers.get(record.layer_digest, [])
    what = Use()
    answer = answers.get(record.slot)
    if answer is not None:
        try:
            index = open_index(Root(question.root).cache.index(record.index))
            history = History(position, index, found.zero)
            ranges, waits = history.ranges(answer), history.waits(answer)
            what = use(index, answer, reads)
        except LazysnapError as error:
            found.missing.append(f"Layer {position + 1}: its files are not known: {error}")
        else:
            found.ranges += ranges
            found.waits += waits
        found.round_trip = max(found.round_trip, answer.round_trip)
        found.bandwidth = max(found.bandwidth, answer.bandwidth)
    return Layer(
        digest=record.layer_digest,
        slot=record.slot,
        mounting_at=_mounting_at(question.root, record, ready),
        ready_at=ready,
        blob_bytes=record.blob_size,
        bytes=described["bytes"],
        local_bytes=described["localBytes"],
        fetched_bytes=described["fetchedBytes"],
        requests=described["requests"],
        use=what,
    )


def _mounting_at(root: str, record: SlotRecord, ready: float | None) -> float | None:
    """When the index was made, if it was for this pull, else when the slot was given out."""
    try:
        given = os.stat(Root(root).slot(record.slot)).st_mtime
    except OSError:
        return None
    if ready is None or given > ready:
        return None  # written again since
    try:
        made = os.stat(Root(root).cache.index(record.index)).st_mtime
    except OSError:
        return given
    return made if given - _INDEX_SECONDS < made < given else given


def _say_what_is_missing(
    question: Question,
    layers: Sequence[Layer],
    answers: Mapping[int, Told],
    profile: Profile | None,
    found: _Findings,
) -> None:
    say = found.missing.append
    for number, layer in enumerate(layers, 1):
        answer = answers.get(layer.slot or 0)
        if answer is None:
            continue
        started = answer.started - found.zero
        if layer.ready_at is not None and started > layer.ready_at:
            say(
                f"Layer {number}: its worker was started after it was mounted; what an earlier"
                " worker fetched, and which reads waited, is not known."
            )
    if dropped := max((answer.forgotten for answer in answers.values()), default=0):
        say(f"So much happened since that {dropped} events were forgotten, the oldest first.")
    if any(answer.recording for answer in answers.values()):
        say("A start is still being recorded: more will be known at its end.")
    if profile is None and answers:
        say(
            "There is no profile of the image, so only reads that waited are known, not all that was read."
        )
    if answers and not found.ranges:
        local = any(layer.local_bytes for layer in layers)
        why = "all that was read was local already" if local else "and nothing was read"
        say(f"Nothing was fetched since the workers were started: {why}.")
    if not any(layer.slot is not None for layer in layers):
        say("No layer of the image is lazy: all of it was downloaded before the start.")


def from_zero(report: Report) -> Report:
    """The same with all times counted from the first of them.

    Args:
        report: with times in seconds since 1970.
    """
    mounted = [
        at
        for layer in report.layers
        for at in (layer.mounting_at, layer.ready_at)
        if at is not None
    ]
    several: Sequence[Sequence[Container | Range | Wait]]
    several = (report.containers, report.ranges, report.waits)
    zero = min([*mounted, *(each.at for some in several for each in some)], default=report.made_at)

    def counted(at: float | None) -> float | None:
        return None if at is None else round(at - zero, 6)

    replace = msgspec.structs.replace
    return replace(
        report,
        zero=zero,
        layers=[
            replace(each, mounting_at=counted(each.mounting_at), ready_at=counted(each.ready_at))
            for each in report.layers
        ],
        containers=[replace(each, at=counted(each.at)) for each in report.containers],
        ranges=[replace(each, at=counted(each.at)) for each in report.ranges],
        waits=[replace(each, at=counted(each.at)) for each in report.waits],
    )
