# SPDX-License-Identifier: Apache-2.0
"""What a registry sent, from its access log: requests, bytes, and bytes that were sent twice.

Knows the log format of ``origin`` and nothing of who asked. A response that was cut short counts
with what the server handed to its socket, which may be a little more than what arrived.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LOG_FORMAT = r"$request_method\t$uri\t$http_range\t$status\t$body_bytes_sent\t$bytes_sent"
_BLOB = re.compile(r"/blobs/(sha256:[0-9a-f]{64})$")
_RANGE = re.compile(r"(\d*)-(\d*)")


@dataclass(frozen=True)
class Totals:
    """Sums over some lines of the log.

    Attributes:
        requests: All of them, HEAD too.
        sent: Bytes with headers.
        blob_bytes: Bytes of blobs.
        duplicate_bytes: How many of those had been sent before.
    """

    requests: int
    sent: int
    blob_bytes: int
    duplicate_bytes: int


def totals(lines: Iterable[str], size_of: Callable[[str], int]) -> Totals:
    """Sum up.

    Args:
        lines: Of the log.
        size_of: The size of a blob by its digest.
    """
    requests = sent = 0
    intervals: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in lines:
        method, uri, asked, status, body, everything = line.rstrip("\n").split("\t")
        requests += 1
        sent += int(everything)
        blob = _BLOB.search(uri)
        if blob is None or method != "GET" or status not in ("200", "206"):
            continue
        wanted = asked.partition("=")[2] if status == "206" else "0-"
        intervals[blob[1]] += _sent_intervals(wanted, int(body), size_of(blob[1]))
    blob_bytes = sum(end - start for found in intervals.values() for start, end in found)
    return Totals(
        requests, sent, blob_bytes, blob_bytes - sum(_union(found) for found in intervals.values())
    )


def _sent_intervals(wanted: str, body: int, size: int) -> list[tuple[int, int]]:
    """The intervals of a blob that a body held: all that was asked, or the part that was sent."""
    asked = []
    for one in wanted.split(","):
        found = _RANGE.search(one)
        assert found is not None, wanted
        first, last = found.groups()
        if first:
            asked.append((int(first), min(int(last) + 1, size) if last else size))
        else:
            asked.append((max(0, size - int(last)), size))
    left, sent = body, []
    for start, end in asked:  # with several ranges, the separators count as blob bytes: a few dozen
        taken = min(end - start, left)
        left -= taken
        sent.append((start, start + taken))
    return sent


def _union(intervals: list[tuple[int, int]]) -> int:
    covered = reached = 0
    for start, end in sorted(intervals):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered
