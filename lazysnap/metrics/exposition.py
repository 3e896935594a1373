# SPDX-License-Identifier: Apache-2.0
"""Writes samples in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lazysnap.metrics.counts import BOUNDS, OTHER, Sample
from lazysnap.metrics.families import FAMILIES, Family, Kind

CONTENT_TYPE = CONTENT_TYPE_LATEST
Gauges = Mapping[str, Mapping[str, float]]


def render(sample: Sample, gauges: Gauges) -> bytes:
    """The text for one scrape.

    Args:
        sample: counters and histograms; what has no family is left out.
        gauges: numbers by name and label.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scrape(sample, gauges))
    return generate_latest(registry)


class _Scrape(Collector):
    """All families with their numbers at one moment."""

    def __init__(self, sample: Sample, gauges: Gauges) -> None:
        self._sample = sample
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, family in FAMILIES.items():
            if family.kind is Kind.GAUGE:
                yield _gauge(name, family, self._gauges.get(name, {}))
                continue
            width = 1 if family.kind is Kind.COUNTER else len(BOUNDS) + 2
            numbers = {label: [0.0] * width for label in family.known}
            found = self._sample.get(name, {})
            # A worker of another release may count otherwise.
            numbers |= {label: each for label, each in found.items() if len(each) == width}
            make = _counter if family.kind is Kind.COUNTER else _histogram
            yield make(name, family, numbers)


def _values(family: Family, label: str) -> list[str]:
    """The value of each label."""
    if not family.labels:
        return []
    values = label.split(",")
    return values if len(values) == len(family.labels) else [OTHER] * len(family.labels)


def _gauge(name: str, family: Family, numbers: Mapping[str, float]) -> Metric:
    metric = GaugeMetricFamily(name, family.meaning, labels=family.labels)
    for label, number in sorted(numbers.items()):
        metric.add_metric(_values(family, label), number)
    return metric


def _counter(name: str, family: Family, numbers: Mapping[str, list[float]]) -> Metric:
    metric = CounterMetricFamily(name, family.meaning, labels=family.labels)
    for label, (number,) in sorted(numbers.items()):
        metric.add_metric(_values(family, label), number)
    return metric


def _histogram(name: str, family: Family, numbers: Mapping[str, list[float]]) -> Metric:
    metric = HistogramMetricFamily(name, family.meaning, labels=family.labels)
    for label, (*counts, total) in sorted(numbers.items()):
        buckets: list[tuple[str, float]] = []
        below = 0.0
        for bound, count in zip((*BOUNDS, float("inf")), counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), below))
        metric.add_metric(_values(family, label), buckets=buckets, sum_value=total)
    return metric
