# SPDX-License-Identifier: Apache-2.0
"""What is fetched ahead of somebody who reads one file after the other."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from lazysnap.fetch.fetcher import Plan
from lazysnap.index.reader import LayerIndex
from lazysnap.prefetch.tree_walks import TreeWalks
from tests.support.indexes import counting, index_of, resolve
from tests.support.layers import estargz, file

_SIZE = 40_000
_COUNT = 400
_AT_FIRST = 26  # files in a mebibyte


@pytest.fixture(scope="module")
def index() -> LayerIndex:
    source = random.Random(1)
    return index_of(estargz([file(_name(n), source.randbytes(_SIZE)) for n in range(_COUNT)]))


def _name(number: int) -> str:
    return f"d/{number:03}"


class Followed:
    """A layer, who reads it, and what is fetched for that; the network is slow."""

    def __init__(self, index: LayerIndex, bandwidth: float = 0.0) -> None:
        self.index = index
        self.fetched: list[int] = []
        self._walks = TreeWalks(index, self._add, lambda: bandwidth)
        self._files = {resolve(index, _name(n)): n for n in range(_COUNT)}

    def _add(self, plan: Plan) -> None:
        chunks = (chunk for number in plan.members for chunk in self.index.member_chunks(number))
        nodes = map(self.index.owner, chunks)
        self.fetched += [self._files[node] for node in nodes if node in self._files]

    def wait_for(self, files: Iterable[int]) -> None:
        """A reader waits for files."""
        for number in files:
            self._walks.missed(resolve(self.index, _name(number)))

    def read(self, files: Iterable[int]) -> int:
        """A reader reads files, and waits for those that were not fetched: for how many."""
        waited = 0
        for number in files:
            if number not in self.fetched:
                self.wait_for([number])
                waited += 1
        return waited


def test_a_few_files_are_no_walk(index: LayerIndex) -> None:
    followed = Followed(index)
    followed.wait_for(range(7))
    assert not followed.fetched


def test_many_parts_of_one_file_are_no_walk(index: LayerIndex) -> None:
    followed = Followed(index)
    followed.wait_for([3] * 100)
    assert not followed.fetched


def test_not_all_chunks_of_a_huge_file_are_looked_at() -> None:
    data = random.Random(1).randbytes(4 << 20)
    counted = counting(estargz([file("large", data)], chunk_size=1 << 10))
    TreeWalks(counted, lambda plan: None, lambda: 0.0).missed(resolve(counted, "large"))
    assert counted.looks < 10


def test_files_far_from_each_other_are_no_walk(index: LayerIndex) -> None:
    followed = Followed(index)
    followed.wait_for(range(0, _COUNT, 60))
    followed.wait_for(range(30, _COUNT, 60))
    assert not followed.fetched


def test_what_lies_before_a_walk_is_fetched(index: LayerIndex) -> None:
    followed = Followed(index)
    followed.wait_for(range(100, 108))
    assert followed.fetched[0] <= 108
    assert followed.fetched == list(range(followed.fetched[0], followed.fetched[-1] + 1))
    assert 108 + _AT_FIRST - 2 <= followed.fetched[-1] <= 108 + _AT_FIRST


def test_more_is_fetched_the_longer_a_walk_goes_on(index: LayerIndex) -> None:
    followed = Followed(index)
    # Double each time: 8 files, then one wait for 1, 2, 4 and 8 MiB.
    assert followed.read(range(_COUNT)) <= 8 + 4
    assert followed.fetched[-1] == _COUNT - 1
    assert len(set(followed.fetched[8:])) == len(followed.fetched[8:])


def test_a_file_that_is_just_coming_is_not_asked_for_again(index: LayerIndex) -> None:
    followed = Followed(index)
    followed.wait_for(range(8))
    fetched = list(followed.fetched)
    followed.wait_for([8, 9, 4, 10])
    assert followed.fetched == fetched


def test_a_walk_that_has_come_far_gets_more_before_it_has_to_wait(index: LayerIndex) -> None:
    followed = Followed(index)
    followed.wait_for(range(8))
    edge = followed.fetched[-1]
    followed.wait_for([edge - 2])
    assert followed.fetched[-1] > edge + _AT_FIRST


def test_walks_in_any_order_are_followed(index: LayerIndex) -> None:
    backwards = Followed(index)
    assert backwards.read(reversed(range(_COUNT))) <= 8 + 6
    shuffled = list(range(60))
    random.Random(2).shuffle(shuffled)
    assert Followed(index).read(shuffled) <= 8 + 4


def test_walks_at_once_are_told_apart(index: LayerIndex) -> None:
    followed = Followed(index)
    for number in range(8):
        followed.wait_for([number, 200 + number])
    assert {20, 220} <= set(followed.fetched)
    assert not {100, 300} & set(followed.fetched)


def test_not_all_of_a_file_of_many_holes_is_looked_at() -> None:
    size, count = 512, 20_000

    def edit(toc: dict[str, Any]) -> None:
        (entry,) = toc["entries"]
        more = {"name": "f", "type": "chunk", "offset": entry["offset"]}
        last = more | {"chunkOffset": count * size, "chunkDigest": entry.pop("chunkDigest")}
        entry |= {"size": count * size + 5, "chunkSize": size, "chunkType": "zeros"}
        zeros = more | {"chunkSize": size, "chunkType": "zeros"}
        toc["entries"] += [zeros | {"chunkOffset": n * size} for n in range(1, count)]
        toc["entries"].append(last)

    index = counting(estargz([file("f", b"bytes")], edit=edit))
    TreeWalks(index, [].append, lambda: 0.0).missed(resolve(index, "f"))
    assert index.looks < 1000


def test_a_fast_network_brings_more_at_once(index: LayerIndex) -> None:
    followed = Followed(index, bandwidth=200e6)
    followed.wait_for(range(8))
    assert followed.fetched[-1] > 200
