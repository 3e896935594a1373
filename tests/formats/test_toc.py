# SPDX-License-Identifier: Apache-2.0
"""Entries of a table of contents."""

from __future__ import annotations

import datetime
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazysnap.errors import FormatError
from lazysnap.formats import toc


def table(entries: Any, **more: Any) -> bytes:
    return json.dumps({"version": 1, "entries": entries, **more}).encode()


def names(data: bytes, **options: Any) -> list[str]:
    return [entry.name for entry in toc.entries(data, **options)]


def test_decodes_fields_and_ignores_others() -> None:
    data = table(
        [
            {
                "name": "f",
                "type": "reg",
                "linkName": "l",
                "devMajor": 1,
                "innerOffset": 2,
                "chunkDigest": "sha256:x",
                "xattrs": {"user.a": "AP8=", "user.b": None, "user.c": ""},
                "accesstime": "2020-01-01T00:00:00.5Z",
                "future": {"a": [1, {}]},
            }
        ],
        tarSplitDigest="sha256:y",
    )
    (entry,) = toc.entries(data)
    assert (entry.link_name, entry.dev_major, entry.inner_offset) == ("l", 1, 2)
    assert entry.xattrs == {"user.a": b"\x00\xff", "user.b": None, "user.c": b""}


@pytest.mark.parametrize("data", [b'{"version":1,"entries":null}', b'{"version":1,"entries":[ ]}'])
def test_no_entries(data: bytes) -> None:
    assert names(data) == []


@pytest.mark.parametrize("indent", [None, "\t", 0])
def test_windows_do_not_change_the_result(indent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ['a},{"' + "}, {" * (i % 3) + str(i) for i in range(500)]
    entries = [{"name": name, "type": "reg", "xattrs": {}} for name in expected]
    data = json.dumps({"version": 1, "entries": entries}, indent=indent).encode()
    for window in (1, 7, 50, 1000, 1 << 20):
        monkeypatch.setattr(toc, "_WINDOW", window)
        assert names(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"version":2,"entries":[]}',
        b'{"version":1,"entries":{}}',
        b'{"version":1,"entries":[1]}',
        b'{"version":1,"entries":[{}]}',
        b'{"version":1,"entries":[{"name":"f"}]}',
        b'{"version":1,"entries":[{"name":"f","type":1}]}',
        b'{"version":1,"entries":[{"name":"f","type":"reg","size":"1"}]}',
        b'{"version":1,"entries":[{"name":"f","type":"reg","size":1.5}]}',
        b'{"version":1,"entries":[{"name":"f","type":"reg","xattrs":{"a":"!"}}]}',
        b'{"version":1,"entries":[{"name":"\xff","type":"reg"}]}',
        b'{"version":1,"entries":[{"name":"\\ud800","type":"reg"}]}',
        b'{"version":1,"entries":[{"name":"f","type":"reg"},]}',
        b'{"version":1,"entries":[{"name":"f","type":"reg"}]',
        b'{"version":1,"entries":[' + b"[" * 200_000 + b"]" * 200_000 + b"]}",
        b'{"version":1,"x":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b',"entries":[]}',
        b'{"version":1,"entries":[{"name":"f","type":"reg","size":' + b"9" * 10_000 + b"}]}",
    ],
    ids=range(20),
)
def test_wrong_json(data: bytes) -> None:
    with pytest.raises(FormatError):
        names(data)


def test_too_many_entries() -> None:
    data = table([{"name": str(i), "type": "dir"} for i in range(11)])
    assert len(names(data, limit=11)) == 11
    with pytest.raises(FormatError, match="more than 10"):
        names(data, limit=10)


@pytest.mark.parametrize("element", ["1", "{}", "[]", '{"name":"","type":""}', '"},{"'])
def test_tiny_elements_do_not_multiply_memory(element: str) -> None:
    count = (20 << 20) // len(element)
    data = b'{"version":1,"entries":[' + ",".join([element] * count).encode() + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            for _ in toc.entries(data, limit=100_000):
                pass
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("1970-01-01T00:00:01Z", 10**9),
        ("2021-02-03T04:05:06.789Z", 1_612_325_106_789_000_000),
        ("2021-02-03T04:05:06.123456789+01:30", 1_612_319_706_123_456_789),
        ("2021-02-03T04:05:06-01:00", 1_612_328_706_000_000_000),
        ("0001-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:59Z", 0),
        ("2262-04-11T23:47:16Z", 9_223_372_036 * 10**9),
        ("2262-04-11T23:47:17Z", 0),
        ("9999-12-31T23:59:59Z", 0),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert toc.parse_time(text) == expected


@pytest.mark.parametrize("text", ["x", "2021-02-03", "2021-13-03T04:05:06Z", "2021-02-03T04:05:06"])
def test_wrong_times(text: str) -> None:
    with pytest.raises(FormatError):
        toc.parse_time(text)


@given(st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2262, 1, 1)))
def test_times_against_datetime(moment: datetime.datetime) -> None:
    seconds = moment.replace(microsecond=0, tzinfo=datetime.UTC).timestamp()
    expected = int(seconds) * 10**9 + moment.microsecond * 1000
    assert toc.parse_time(moment.isoformat() + "Z") == expected
