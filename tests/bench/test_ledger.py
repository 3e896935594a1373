# SPDX-License-Identifier: Apache-2.0
"""Nothing that a registry sends twice may escape the benchmark's ledger."""

from __future__ import annotations

from tests.bench.ledger import Totals, totals

_ONE = f"/v2/image/blobs/sha256:{'1' * 64}"
_OTHER = f"/v2/image/blobs/sha256:{'2' * 64}"
_SIZE = 1000


def _line(uri: str, asked: str, body: int, status: int = 206, method: str = "GET") -> str:
    return f"{method}\t{uri}\t{asked}\t{status}\t{body}\t{body + 300}\n"


def _totals(*lines: str) -> Totals:
    return totals(lines, lambda digest: _SIZE)


def test_bytes_of_overlapping_ranges_count_as_sent_twice() -> None:
    found = _totals(_line(_ONE, "bytes=0-99", 100), _line(_ONE, "bytes=90-199", 110))
    assert found == Totals(2, 810, 210, 10)


def test_neighbours_and_other_blobs_are_not_duplicates() -> None:
    found = _totals(
        _line(_ONE, "bytes=0-99", 100),
        _line(_ONE, "bytes=100-199", 100),
        _line(_OTHER, "bytes=0-99", 100),
    )
    assert found.duplicate_bytes == 0


def test_a_suffix_and_an_open_range_reach_to_the_end() -> None:
    found = _totals(_line(_ONE, "bytes=-100", 100), _line(_ONE, "bytes=950-", 50))
    assert found.duplicate_bytes == 50


def test_a_whole_blob_sent_again_is_a_duplicate() -> None:
    found = _totals(_line(_ONE, "-", _SIZE, 200), _line(_ONE, "bytes=0-9", _SIZE, 200))
    assert found.duplicate_bytes == _SIZE


def test_a_response_that_was_cut_short_counts_as_far_as_it_came() -> None:
    found = _totals(_line(_ONE, "bytes=0-99", 40), _line(_ONE, "bytes=40-99", 60))
    assert found == Totals(2, 700, 100, 0)


def test_several_ranges_in_one_request() -> None:
    found = _totals(_line(_ONE, "bytes=0-9,20-29", 150), _line(_ONE, "bytes=25-34", 10))
    assert found.duplicate_bytes == 5


def test_what_is_no_blob_counts_as_a_request_only() -> None:
    found = _totals(
        _line("/v2/image/manifests/tag", "-", 500, 200),
        _line(_ONE, "-", 0, 200, "HEAD"),
        _line(_ONE, "bytes=0-9", 100, 416),
    )
    assert found == Totals(3, 1500, 0, 0)
