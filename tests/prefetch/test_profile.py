# SPDX-License-Identifier: Apache-2.0
"""Profiles: hostile ones, and what plans are made of them."""

from __future__ import annotations

import itertools
import json
import random
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazysnap.errors import FormatError
from lazysnap.fetch.fetcher import Plan
from lazysnap.index.reader import LayerIndex
from lazysnap.prefetch import profile as module
from lazysnap.prefetch.profile import (
    Profile,
    Read,
    coalesce,
    from_reads,
    landmark_plan,
    locate,
    merge,
    parse,
    plan,
    serialize,
)
from lazysnap.prefetch.recorder import Recorder, reads
from tests.support.indexes import index_of, resolve
from tests.support.layers import estargz, file

MANIFEST = "sha256:" + "1" * 64
LAYER = "sha256:" + "2" * 64
_RANDOM = random.Random(1)
_SIZES = {"a": 100, "dir/b": 5000, "c": 40_000, "d": 900, "e": 150_000, "empty": 0}
INDEX = index_of(
    estargz([file(n, _RANDOM.randbytes(s)) for n, s in _SIZES.items()], chunk_size=4096)
)

_quickly = settings(max_examples=60, deadline=None)
_numbers = st.integers(0, 200_000)
_paths = st.sampled_from([*_SIZES, "nothing", "dir", "a/b", "", "/", "dir//b", "\0", "é"])
_reads = st.lists(st.builds(Read, _paths, _numbers, _numbers, st.integers(0, 30_000)), max_size=20)
_profiles = st.builds(
    Profile,
    manifest=st.text(),
    command=st.lists(st.text(), max_size=3),
    layers=st.dictionaries(st.text(), _reads, max_size=3),
)


def _plan(index: LayerIndex, reads: list[Read]) -> Plan:
    return plan(index, locate(index, reads))


def _bytes_of(found: list[Read]) -> set[tuple[str, int]]:
    """Each hundredth byte, to be quick."""
    return {
        (read.path, at)
        for read in found
        for at in range(-(-read.offset // 100) * 100, read.offset + read.length, 100)
    }


@_quickly
@given(_profiles)
def test_what_is_serialized_is_parsed(profile: Profile) -> None:
    assert parse(serialize(profile)) == profile


@_quickly
@given(st.binary())
def test_bytes_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@_quickly
@given(_json, _json, _json, _json)
def test_any_json_is_a_profile_or_a_format_error(
    a: object, b: object, c: object, d: object
) -> None:
    fields = {"version": 1, "manifest": a, "command": b, "layers": {"x": [["a", 0, c, d]]}}
    for value in (a, fields, {"manifest": "m", "layers": {"x": [["a", c, d, 0]]}}):
        try:
            _plan(INDEX, parse(json.dumps(value).encode()).layers.get("x", []))
        except FormatError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b'{"manifest":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"manifest":"m","layers":{"x":[["\xed\xa0\x80",0,1,2]]}}',
        b'{"manifest":"m","layers":{"x":[["\\ud800",0,1,2]]}}',
        b'{"manifest":"m","layers":{"x":[["a",-1,1,2]]}}',
        b'{"manifest":"m","layers":{"x":[["a",0,-1,2]]}}',
        b'{"manifest":"m","layers":{"x":[["a",0,1,-2]]}}',
        b'{"manifest":"m","layers":{"x":[["a",0,99999999999999999999,2]]}}',
        b'{"manifest":"m","layers":{"x":[["a",0,1.5,2]]}}',
        b'{"manifest":"m","version":2}',
        b'{"layers":{}}',
        b"[]",
        b"",
        b" " * (module.MAX_SIZE + 1),
    ],
    ids=range(13),
)
def test_hostile_bytes_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse(data)


@_quickly
@given(_reads)
def test_coalescing_keeps_every_byte_once_and_orders_by_time(found: list[Read]) -> None:
    joined = coalesce(found)
    assert _bytes_of(joined) == _bytes_of(found)
    assert [read.at_ms for read in joined] == sorted(read.at_ms for read in joined)
    assert all(read.length > 0 for read in joined)
    by_place = sorted(joined, key=lambda read: (read.path, read.offset))
    for one, other in itertools.pairwise(by_place):
        assert one.path != other.path or one.offset + one.length <= other.offset
    assert len(joined) <= len(found)


def test_a_long_file_is_not_wanted_when_its_beginning_is() -> None:
    found = [Read("f", n * 100, 100, n * 10) for n in range(50)]
    assert coalesce(found) == [Read("f", 0, 5000, 0)]
    late = [Read("f", 5000, 100, 9000), Read("f", 5050, 100, 9010)]
    assert coalesce([*found, *late]) == [Read("f", 0, 5000, 0), Read("f", 5000, 150, 9000)]


@_quickly
@given(_reads, _reads)
def test_merging_is_the_union_with_the_earlier_times(one: list[Read], other: list[Read]) -> None:
    first, second = from_reads(MANIFEST, ["a"], {LAYER: one}), from_reads("", [], {LAYER: other})
    merged = merge(first, second)
    assert (merged.manifest, merged.command) == (MANIFEST, ["a"])
    found = merged.layers.get(LAYER, [])
    assert _bytes_of(found) == _bytes_of([*one, *other])
    if found:
        earliest = min(read.at_ms for read in [*one, *other] if read.length)
        assert min(read.at_ms for read in found) == earliest


@_quickly
@given(_reads)
def test_a_plan_names_what_is_read_once_in_the_order_of_need(found: list[Read]) -> None:
    made = _plan(INDEX, found)
    members = list(made.members)
    assert len(set(members)) == len(members) == len(made.wanted_at)
    assert all(0 <= number < INDEX.member_count for number in members)
    assert list(made.wanted_at) == sorted(made.wanted_at)
    needed = set()
    for read in found:
        node = resolve(INDEX, read.path) if "//" not in read.path else -1
        size = _SIZES.get(read.path, 0)
        if node >= 0 and read.offset < size and read.length:
            last = min(read.offset + read.length, size) - 1
            for chunk in range(INDEX.chunk_at(node, read.offset), INDEX.chunk_at(node, last) + 1):
                needed.add(INDEX.chunk(chunk).member)
    assert needed <= set(members)
    for extra in set(members) - needed:
        # Only what lies between two that are needed, and close to both.
        below = max(number for number in needed if number < extra)
        above = min(number for number in needed if number > extra)
        assert INDEX.member(above).blob_offset - INDEX.member(below).blob_end <= module._GAP


def test_gaps_are_filled_when_they_are_small() -> None:
    data = _RANDOM.randbytes(4 << 20)
    index = index_of(estargz([file("f", data)], chunk_size=16 << 10))
    chunk = 16 << 10
    near = _plan(index, [Read("f", 0, 1, 0), Read("f", 2 * chunk, 1, 0)])
    far = _plan(index, [Read("f", 0, 1, 0), Read("f", 9 * chunk, 1, 0)])
    assert len(near.members) == 3
    assert len(far.members) == 2


def test_needs_far_apart_are_not_put_in_the_order_of_the_blob() -> None:
    data = _RANDOM.randbytes(16 << 20)
    index = index_of(
        estargz([file("a", data[: 8 << 20]), file("b", data[8 << 20 :])], chunk_size=1 << 20)
    )
    made = _plan(index, [Read("b", 0, 8 << 20, 10), Read("a", 0, 8 << 20, 5000)])
    halves = [number >= index.member_count // 2 for number in made.members]
    assert halves == sorted(halves, reverse=True)


def test_a_profile_that_names_the_same_range_very_often_costs_little() -> None:
    index = index_of(estargz([file("f", bytes(4 << 20))], chunk_size=1024))
    made = _plan(index, [Read("f", 0, 4 << 20, n) for n in range(100_000)])
    assert len(made.members) == 4096


def test_no_profile_that_is_stored_is_too_large_to_be_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SIZE", 20_000)
    found = [Read(f"file{n}", 0, 1, n) for n in range(5000)]
    for times in (found, [msgspec.structs.replace(read, at_ms=7) for read in found]):
        kept = parse(serialize(from_reads(MANIFEST, [], {LAYER: times, "other": times})))
        assert 100 < sum(map(len, kept.layers.values())) < 2000
    first = parse(serialize(from_reads(MANIFEST, [], {LAYER: found}))).layers[LAYER]
    assert first == found[: len(first)]


def test_a_landmark_is_where_prefetching_ends() -> None:
    entries = [file(f"f{n:03}", _RANDOM.randbytes(3000)) for n in range(100)]
    assert landmark_plan(index_of(estargz(entries))) is None
    assert landmark_plan(index_of(estargz(entries, prioritized=[]))) is None
    index = index_of(estargz(entries, prioritized=["f090", "f010"]))
    made = landmark_plan(index)
    assert made is not None
    nodes = {index.chunk(i).node for n in made.members for i in index.member_chunks(n)}
    assert nodes >= {resolve(index, "f090"), resolve(index, "f010")}
    assert len(nodes) <= 3  # and perhaps the landmark itself


# Recorder.


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [1000.0]
    monkeypatch.setattr("lazysnap.prefetch.recorder.time.monotonic", lambda: moment[0])
    return moment


def _notes(recorder: Recorder, since: float) -> list[Read]:
    notes = recorder.end(since)
    assert notes is not None
    return reads(INDEX, notes, since)


def test_reads_are_named_by_path_and_milliseconds(now: list[float]) -> None:
    recorder = Recorder()
    recorder.begin(1000.0)
    now[0] += 1.5
    recorder.note(resolve(INDEX, "c"), 39_000, 131_072)
    recorder.note(resolve(INDEX, "dir/b"), 0, 10)
    recorder.note(resolve(INDEX, "empty"), 0, 4096)
    expected = [Read("c", 39_000, 1000, 1500), Read("dir/b", 0, 10, 1500)]
    assert _notes(recorder, 1000.0) == expected
    assert recorder.idle


def test_starts_that_are_watched_at_once_do_not_disturb_each_other(now: list[float]) -> None:
    recorder = Recorder()
    recorder.begin(1000.0)
    recorder.note(resolve(INDEX, "a"), 0, 10)
    now[0] = 1002.0
    recorder.begin(1002.0)
    now[0] = 1003.0
    recorder.note(resolve(INDEX, "d"), 0, 10)
    assert _notes(recorder, 1000.0) == [Read("a", 0, 10, 0), Read("d", 0, 10, 3000)]
    assert not recorder.idle
    assert recorder.end(1000.0) is None
    assert _notes(recorder, 1002.0) == [Read("d", 0, 10, 1000)]


def test_a_recorder_that_is_forgotten_takes_bounded_memory_and_ends(now: list[float]) -> None:
    recorder = Recorder()
    recorder.begin(1000.0)
    for n in range(60_000):
        recorder.note(0, n, 1)
    assert recorder.attentive
    now[0] += 10_000
    assert not recorder.attentive
    recorder.begin(now[0])
    assert recorder.end(1000.0) is None
    assert recorder.end(now[0]) == []


def test_a_start_is_over_when_nothing_or_everything_is_read(now: list[float]) -> None:
    recorder = Recorder()
    assert not recorder.worthwhile
    recorder.begin(now[0])
    assert recorder.worthwhile
    for number in range(6_000):
        recorder.note(number, 0, 1)
    assert not recorder.worthwhile
    slow = Recorder()
    # Told late, as all was busy.
    slow.begin(now[0] - 60)
    assert slow.worthwhile
    now[0] += 60
    assert not slow.worthwhile
    assert slow.attentive
    slow.note(1, 0, 1)
    assert slow.worthwhile


def test_who_walks_through_a_layer_is_no_start(now: list[float]) -> None:
    recorder = Recorder()
    recorder.begin(1000.0)
    recorder.note(resolve(INDEX, "a"), 0, 10)
    recorder.give_up({999.0, 1000.0})
    assert not recorder.worthwhile
    now[0] += 1
    recorder.begin(1001.0)
    assert recorder.worthwhile
    recorder.give_up(recorder.sessions)
    assert _notes(recorder, 1000.0) == [Read("a", 0, 10, 0)]
    assert recorder.end(1001.0) == []
    assert recorder.idle


@pytest.mark.parametrize(("count", "step", "walks"), [(1024, 1, 1), (1023, 1, 0), (2000, 2, 0)])
def test_reading_nearly_all_of_many_files_is_a_walk(count: int, step: int, walks: int) -> None:
    seen: list[None] = []
    nodes = [number * step for number in range(count)]
    random.Random(1).shuffle(nodes)
    recorder = Recorder(lambda node: 5000 - node, lambda: seen.append(None))
    recorder.begin(time.monotonic())
    for node in nodes:
        recorder.note(node, 0, 10)
        recorder.note(0, 0, 10)
    assert bool(seen) == bool(walks)
