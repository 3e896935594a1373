# SPDX-License-Identifier: Apache-2.0
"""All numbers that lazysnap tells Prometheus: names, kinds, meanings. Does no I/O.

To add one: a line here, and a call of `counts` where it happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a number behaves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Family:
    """One number, or one for each value of its labels.

    Attributes:
        kind: how it behaves.
        meaning: one line.
        labels: names of its labels.
        known: values that are shown from the start, so that the first event is an increase.
    """

    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


def _counter(meaning: str, *labels: str, known: tuple[str, ...] = ()) -> Family:
    return Family(Kind.COUNTER, meaning, labels, known if labels else ("",))


def _gauge(meaning: str, *labels: str) -> Family:
    return Family(Kind.GAUGE, meaning, labels)


def _histogram(meaning: str, *labels: str) -> Family:
    return Family(Kind.HISTOGRAM, meaning, labels, () if labels else ("",))


_CLASSES = ("demand", "prefetch", "background")

GRPC_SECONDS = "lazysnap_grpc_request_seconds"
GRPC_ERRORS = "lazysnap_grpc_errors"
MOUNT_SECONDS = "lazysnap_mount_seconds"
FALLBACKS = "lazysnap_fallbacks"
RESTORED = "lazysnap_restored_layers"
SHARD_RESTARTS = "lazysnap_shard_restarts"
FUSE_SECONDS = "lazysnap_fuse_request_seconds"
FUSE_ERRORS = "lazysnap_fuse_errors"
READ_BYTES = "lazysnap_read_bytes"
READS_MISSED = "lazysnap_reads_missed"
READ_BYTES_MISSED = "lazysnap_read_bytes_missed"
FETCH_SECONDS = "lazysnap_fetch_seconds"
FETCH_BYTES = "lazysnap_fetch_bytes"
FETCH_ERRORS = "lazysnap_fetch_errors"
REGISTRY_REQUESTS = "lazysnap_registry_requests"
REGISTRY_BYTES = "lazysnap_registry_received_bytes"
REGISTRY_RETRIES = "lazysnap_registry_retries"
RENEWALS = "lazysnap_credential_renewals"
EVICTED = "lazysnap_evicted_contents"
EVICTED_BYTES = "lazysnap_evicted_bytes"
READS_IN_FLIGHT = "lazysnap_reads_in_flight"
READS_HUNG = "lazysnap_reads_hung"
WORKER_MEMORY = "lazysnap_worker_resident_bytes"
SHARDS = "lazysnap_shards"
LAZY_LAYERS = "lazysnap_lazy_layers"
INFO = "lazysnap_info"

FAMILIES = {
    INFO: _gauge("The release that runs; always 1.", "version"),
    GRPC_SECONDS: _histogram("Calls of containerd's.", "method"),
    GRPC_ERRORS: _counter(
        "Calls that were answered with an error; AlreadyExists of prepare is a lazy layer.",
        *("method", "code"),
    ),
    MOUNT_SECONDS: _histogram("Until a lazy layer was answered for; its mount may come later."),
    FALLBACKS: _counter("Layers that were asked for lazily and are unpacked instead.", "reason"),
    LAZY_LAYERS: _gauge("Layers that are mounted lazily."),
    RESTORED: _counter(
        "Layers that were mounted before a start of the daemon, by whether they are again.",
        "result",
        known=("ok", "failed"),
    ),
    SHARDS: _gauge("Processes that serve layers, by whether they answer.", "state"),
    SHARD_RESTARTS: _counter(
        "Shards: died (worker replaced), stuck (worker killed), gone (mounted anew), release.",
        "cause",
        known=("died", "stuck", "gone", "release"),
    ),
    WORKER_MEMORY: _gauge("Resident memory of all workers together."),
    FUSE_SECONDS: _histogram("Requests of the kernel to the shards.", "operation"),
    FUSE_ERRORS: _counter("Requests of the kernel that failed for want of bytes.", "operation"),
    READS_IN_FLIGHT: _gauge("Reads that wait for the disk or the network now."),
    READS_HUNG: _gauge("Reads that have waited for more than 30 seconds."),
    READ_BYTES: _counter("Bytes that the kernel read from shards."),
    READS_MISSED: _counter(
        "Reads that had to wait for the network; the hit ratio is 1 minus the share of these in"
        " lazysnap_fuse_request_seconds_count{operation=read}."
    ),
    READ_BYTES_MISSED: _counter("Bytes of such reads; the rest of the bytes were in the cache."),
    FETCH_SECONDS: _histogram("Requests for parts of layers, from turn to last byte.", "class"),
    FETCH_BYTES: _counter("Bytes of layers from the network.", "class", known=_CLASSES),
    FETCH_ERRORS: _counter("Requests for parts of layers that failed for good."),
    REGISTRY_REQUESTS: _counter("Requests to registries, of all kinds."),
    REGISTRY_BYTES: _counter("Bytes from registries, of all kinds."),
    REGISTRY_RETRIES: _counter("Requests to registries that repeat a failed one."),
    RENEWALS: _counter("Logins to registries.", "result", known=("ok", "failed")),
    EVICTED: _counter("Contents that were evicted from the cache."),
    EVICTED_BYTES: _counter("Bytes on disk that evictions have freed."),
}
"""By name, without the suffixes that Prometheus adds."""
