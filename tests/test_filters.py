# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lazysnap import filters
from lazysnap.errors import InvalidArgument
from tests.support.golang import build

FIELDS = {
    "kind": "active",
    "name": "k8s.io/17/sha256:abc",
    "parent": "",
    "labels.containerd.io/snapshot.ref": "sha256:0123",
    "labels.a": "1",
    "labels.b.c": "x y",
    "labels.empty": "",
    "a": "a/b|c",
}


def ours(texts: Sequence[str], fields: Mapping[str, str] = FIELDS) -> bool | None:
    try:
        match = filters.compile(texts)
    except InvalidArgument:
        return None
    found = match(lambda path: fields.get(".".join(path)))
    if found:
        # what a store may use to look only at some objects must hold for all that match
        for path, value in match.required.items():
            assert fields.get(".".join(path)) == value
    return found


class Containerd:
    """containerd's own filter package, in a process of its own."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, texts: Sequence[str]) -> bool | None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"filters": texts, "fields": FIELDS}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer in (True, False, None)
        return answer


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    program = build(Path(__file__).parent / "conformance" / "filters", "build")
    filter_package = Containerd(program)
    with filter_package.process as process:
        yield filter_package
        assert process.stdin
        process.stdin.close()


PIECES = st.sampled_from(
    [
        *("kind", "name", "parent", "labels", "a", "b", "empty", "active", "sha256:0123", "1"),
        *('"a"', '"containerd.io/snapshot.ref"', "/a.b/", "|b|", '"x y"', "/^sha256:/", '"('),
        *("==", "!=", "~=", "=", "=== ", ",", ".", " ", "\t", "\n", "\u2003", "\u00a0", "\u200b"),
        *('"', "/", "|", "\\", "'", "-", "\x01", "\x7f", "é", "\u0301", "\ufffd", "😀", "\ue000"),
        *("\\x41", "\\101", "\\400", "\\u0041", "\\U0001F600", "\\ud800", "\\xff", "\\n", "\\/"),
        *(
            "(",
            ")",
            "[",
            "*",
            "+",
            "a{2}",
            "$",
            "^",
            "\\d",
            "(?i)ACT",
            "\\\\d",
            "(?P<n>a)",
            "(?=a)",
        ),
    ]
)
TEXTS = st.lists(
    st.one_of(st.lists(PIECES, max_size=9).map("".join), st.text(max_size=12)), max_size=3
)


@settings(
    max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXTS)
@example([])
@example([""])
@example(["kind==view", ""])
@example(['labels."containerd.io/snapshot.ref"==sha256:0123,parent==""'])
@example(['labels."containerd.io/snapshot.ref"==sha256:0123,parent=="x"'])
@example(["kind==active", "kind==view"])
@example(["name~=/17.sha256/,labels.a"])
@example(["labels.b.c==" + '"x y"'])
@example(["a==a/b|c"])
@example(["a==/b"])
@example(['a~="\\\\d"'])
@example(["kind~=(?i)ACT"])
@example(["missing!=x,missing~=^$"])
@example(["labels.empty"])
@example(["kind ==active"])
@example(["kind== active"])
@example(["kind==active ,a"])
@example(['kind=="\\u0061ctive"'])
@example(['"kind"==active'])
def test_filters_mean_what_they_mean_to_containerd(
    containerd: Containerd, texts: list[str]
) -> None:
    assert ours(texts) == containerd(texts)


def test_null_is_refused() -> None:
    # cannot be asked over JSON lines without an escape that Go decodes the same way
    for text in ("a\0", 'a=="\0"', "\0"):
        with pytest.raises(InvalidArgument, match="not allowed"):
            filters.compile([text])


def test_the_remote_snapshot_filter_tells_what_it_requires() -> None:
    match = filters.compile(['labels."containerd.io/snapshot.ref"==sha256:1,parent=="default/3/x"'])
    assert match.required == {
        ("labels", "containerd.io/snapshot.ref"): "sha256:1",
        ("parent",): "default/3/x",
    }
    assert filters.compile(["parent==a", "kind==view"]).required == {}


def test_a_hostile_pattern_takes_no_time() -> None:
    match = filters.compile(["a~=^(a+)+$"])
    # By trying all ways to match it, this would never end.
    assert not match(lambda _path: "a" * 100_000 + "b")


def test_an_error_shows_little_of_a_long_filter() -> None:
    with pytest.raises(InvalidArgument) as caught:
        filters.compile(["=" * 1_000_000])
    assert len(str(caught.value)) < 500
