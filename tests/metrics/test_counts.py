# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import shutil
import subprocess
import threading
from bisect import bisect_left
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from lazysnap.metrics import families
from lazysnap.metrics.counts import BOUNDS, Counts, Sample
from lazysnap.metrics.exposition import render
from lazysnap.metrics.families import FAMILIES
from lazysnap.metrics.totals import Totals, added


def parsed(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Numbers by name and labels, as prometheus_client's own parser reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def _everything() -> tuple[Sample, dict[str, dict[str, float]]]:
    counts = Counts()
    gauges: dict[str, dict[str, float]] = {}
    for name, family in FAMILIES.items():
        label = ",".join("x" for _ in family.labels)
        if family.kind is families.Kind.COUNTER:
            counts.add(name, label)
        elif family.kind is families.Kind.HISTOGRAM:
            counts.observe(name, label, 0.5)
        else:
            gauges[name] = {label: 1.0}
    return counts.sample(), gauges


def test_promtool_has_no_complaints() -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=render(*_everything()),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_family_is_written() -> None:
    read = {name for name, _ in parsed(render(*_everything()))}
    suffixes = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    assert {name + suffixes[family.kind.value] for name, family in FAMILIES.items()} <= read


def test_known_series_are_there_before_anything_happens() -> None:
    read = parsed(render({}, {}))
    assert read["lazysnap_shard_restarts_total", (("cause", "died"),)] == 0
    assert read["lazysnap_evicted_contents_total", ()] == 0
    assert read["lazysnap_mount_seconds_count", ()] == 0


@given(st.lists(st.floats(0, 100) | st.sampled_from(BOUNDS), max_size=50))
def test_buckets_are_those_of_prometheus_own_histogram(observed: list[float]) -> None:
    registry = CollectorRegistry()
    theirs = Histogram(families.MOUNT_SECONDS, "x", buckets=BOUNDS, registry=registry)
    counts, numbers = Counts(), [0.0] * (len(BOUNDS) + 2)
    for seconds in observed:
        theirs.observe(seconds)
        counts.observe(families.MOUNT_SECONDS, "", seconds)
        numbers[bisect_left(BOUNDS, seconds)] += 1
        numbers[-1] += seconds
    ours = parsed(render(counts.sample(), {}))
    for sample in next(iter(registry.collect())).samples:
        if not sample.name.endswith("_created"):
            labels = tuple(sorted(sample.labels.items()))
            assert ours[sample.name, labels] == pytest.approx(sample.value)
    if observed:
        assert counts.histogram(families.MOUNT_SECONDS) == pytest.approx(numbers)


def test_several_labels() -> None:
    counts = Counts()
    counts.add(families.GRPC_ERRORS, "prepare,ALREADY_EXISTS", 3)
    read = parsed(render(counts.sample(), {}))
    labels = (("code", "ALREADY_EXISTS"), ("method", "prepare"))
    assert read["lazysnap_grpc_errors_total", labels] == 3


def test_labels_are_bounded() -> None:
    counts = Counts()
    for number in range(5000):
        counts.add(families.FALLBACKS, f"reason-{number}")
    labels = counts.sample()[families.FALLBACKS]
    assert len(labels) <= 101
    assert sum(numbers[0] for numbers in labels.values()) == 5000


def test_threads_lose_nothing() -> None:
    counts = Counts()

    def work() -> None:
        for _ in range(5000):
            counts.add(families.EVICTED)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.sample() == {families.EVICTED: {"": [20000]}}


def _sample(value: float, name: str = "n") -> Sample:
    return {name: {"l": [value]}}


def test_a_worker_that_was_replaced_still_counts() -> None:
    totals = Totals()
    totals.note(0, "a", _sample(5), whole=True)
    totals.note(1, "b", _sample(7), whole=True)
    assert totals.sum() == _sample(12)
    totals.note(0, "c", _sample(1), whole=True)
    assert totals.sum() == _sample(13)
    totals.note(0, "c", _sample(2), whole=True)
    assert totals.sum() == _sample(14)


def test_a_worker_from_before_the_daemon_counts_from_now_on() -> None:
    totals = Totals()
    totals.note(0, "a", _sample(1000), whole=False)
    assert totals.sum() == _sample(0)
    totals.note(0, "a", {**_sample(1003), **_sample(2, "m")}, whole=False)
    assert totals.sum() == {**_sample(3), **_sample(2, "m")}
    totals.note(0, "b", _sample(1), whole=True)
    assert totals.sum() == {**_sample(4), **_sample(2, "m")}


@given(st.data())
def test_no_sum_ever_goes_back(data: Any) -> None:
    """Workers count up, die and are replaced in any order."""
    totals = Totals()
    state = {0: (0, 0), 1: (0, 0)}
    before = 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        place = data.draw(st.integers(0, 1))
        process, value = state[place]
        if data.draw(st.booleans()):
            process, value = process + 1, 0
        value += data.draw(st.integers(0, 5))
        state[place] = (process, value)
        totals.note(place, str(process), _sample(value), whole=data.draw(st.booleans()))
        now = totals.sum()["n"]["l"][0]
        assert now >= before
        before = now


def test_samples_of_different_releases_do_not_break_a_scrape() -> None:
    old = {families.MOUNT_SECONDS: {"": [1.0, 2.0]}, "lazysnap_of_old": {"": [1.0]}}
    new = {families.MOUNT_SECONDS: {"": [1.0] * (len(BOUNDS) + 2)}}
    read = parsed(render(added(old, new), {}))
    assert read["lazysnap_mount_seconds_count", ()] == len(BOUNDS) + 1
    assert not any(name.startswith("lazysnap_of_old") for name, _ in read)
