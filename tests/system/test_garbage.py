# SPDX-License-Identifier: Apache-2.0
"""A pull and what it leaves is safe from containerd's garbage collection, even if that never rests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import SNAPSHOTTER, Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path, collects_always=True) as it:
        yield it


def test_what_nobody_holds_is_collected(it: Stack) -> None:
    """Else the other test here would prove nothing."""
    it.pull(it.push_busybox("image", ["estargz"] * 3))
    snapshots = it.containerd.snapshots(SNAPSHOTTER)
    (top,) = snapshots.keys() - {parent for parent, _ in snapshots.values()}
    it.containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "view", "forgotten", top)
    wait_until(lambda: "forgotten" not in it.containerd.snapshots(SNAPSHOTTER))


@pytest.mark.parametrize("forms", [["estargz"] * 3, ["plain", "estargz", "plain"]])
def test_an_image_is_pulled_and_runs_while_garbage_is_collected(
    it: Stack, forms: list[str]
) -> None:
    reference = it.push_busybox("image", forms)
    it.pull(reference)
    for _ in range(3):
        assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"
    before = it.containerd.snapshots(SNAPSHOTTER), it.containerd.contents()
    it.pull(reference)
    assert (it.containerd.snapshots(SNAPSHOTTER), it.containerd.contents()) == before
    assert it.containerd.leases() == []
