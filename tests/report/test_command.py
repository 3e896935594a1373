# SPDX-License-Identifier: Apache-2.0
"""`lazysnap report` on a real stack, against what the registry and the workers counted themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lazysnap.cli import main
from lazysnap.layers.slots import SlotRecord, write_slot
from tests.support.stack import Stack, stack, wait_until

CONFIG = """
[shards]
count = 1
[fetch]
background = false
learn_profiles = false
"""


def _report(it: Stack, *arguments: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "lazysnap", "report", "--root", str(it.lazysnap.root), "--json"]
    done = subprocess.run([*words, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_the_start_of_an_image(tmp_path: Path) -> None:
    with stack(tmp_path, config=CONFIG) as it:
        payload = os.urandom(1_000_000).hex().encode()
        reference = it.push_busybox("lazy", ["estargz", "estargz", "plain"], payload=payload)
        it.pull(reference)
        name = f"reader-{os.urandom(6).hex()}"  # known to the whole machine
        it.containerd.ctr(
            *("run", "-d", "--snapshotter", "lazysnap", reference, name, "sleep", "600")
        )
        it.run(reference, "cat", "/data/payload")
        it.lazysnap.stop()  # not needed
        page = tmp_path / "page.html"
        told = _counted_as_well(it, reference, "--output", str(page))
        assert told["image"] == reference
        assert [bool(layer["slot"]) for layer in told["layers"]] == [True, True, False]
        assert told["layers"][2]["reason"] == "no-toc-digest"
        assert told["layers"][2]["diskBytes"] > 0
        waited = {wait["file"] for wait in told["waits"]}
        assert {"data/payload", "bin/busybox"} <= waited
        assert {slow["file"] for slow in told["slowest"]} == waited
        (container,) = (c for c in told["containers"] if c["key"].endswith(f"/{name}"))
        for layer in told["layers"][:2]:
            assert 0 <= layer["mountingAt"] <= layer["readyAt"] <= container["at"]
        read = [wait["at"] for wait in told["waits"] if wait["file"] == "data/payload"]
        assert container["at"] <= min(read)  # by the container after this one
        assert any("no profile" in sentence for sentence in told["missing"])
        assert page.read_text().count('data-range="') == len(told["ranges"])
        _after_a_restart(it, reference)


def _counted_as_well(it: Stack, *arguments: str) -> dict[str, Any]:
    """A report that has all that the workers counted, when nothing is fetched any more."""
    (shard,) = it.lazysnap.shards()
    found: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []

    def at_rest() -> bool:
        before = _counts(it, shard)
        told = _report(it, *arguments)
        found.append((told, before))
        return before == _counts(it, shard) and not any(r["underWay"] for r in told["ranges"])

    wait_until(at_rest)
    told, counted = found[-1]
    for layer in counted:
        mine = [
            each
            for each in told["ranges"]
            if told["layers"][each["layer"]]["slot"] == layer["slot"]
        ]
        # What was fetched along with the table of contents is no request.
        assert sum(each["received"] > 0 for each in mine) == layer["requests"]
        assert sum(each["received"] for each in mine) == layer["fetched_bytes"]
    assert sum(layer["requests"] for layer in counted) > 0
    return told


def _counts(it: Stack, shard: int) -> list[dict[str, Any]]:
    names = ("slot", "requests", "fetched_bytes")
    return [{key: each[key] for key in names} for each in it.lazysnap.call(shard, "status")]


def _after_a_restart(it: Stack, reference: str) -> None:
    """The next worker knows nothing of it, and says so; what it served goes on."""
    ((shard, worker),) = it.lazysnap.workers().items()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: it.lazysnap.workers()[shard] != worker)
    told = _report(it, reference)
    assert told["ranges"] == []
    for number in (1, 2):
        assert any(
            sentence.startswith(f"Layer {number}: its worker was started after")
            for sentence in told["missing"]
        )


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_what_a_profile_had_fetched_ahead(tmp_path: Path) -> None:
    with stack(tmp_path, config=CONFIG) as it:
        payload = os.urandom(600_000).hex().encode()
        reference = it.push_busybox("known", ["estargz"] * 3, payload=payload)
        it.pull(reference)
        words = [sys.executable, "-m", "lazysnap", "profile", reference, "--address"]
        words += [str(it.containerd.address), "--root", str(it.lazysnap.root)]
        subprocess.run([*words, "--", "cat", "/data/payload"], check=True, capture_output=True)
        told = _report(it, reference, "--output", str(tmp_path / "page.html"))
        uses = [layer["use"] for layer in told["layers"]]
        assert all(use["known"] for use in uses)
        assert sum(use["read"] for use in uses) >= len(payload)
        assert sum(use["before"] for use in uses) == 0
        assert 0 < told["savings"]["roundTrips"] <= told["savings"]["waits"]
        assert sum(use["needed"] for use in uses) > 600_000
        assert sum(use[kind] for use in uses for kind in ("hits", "late", "along", "missed")) > 0
        assert 0 < told["savings"]["neededShare"] <= 1
        assert told["savings"]["bandwidth"] >= 0
        assert not any("no profile" in sentence for sentence in told["missing"])


def test_a_shard_that_does_not_answer(tmp_path: Path) -> None:
    record = SlotRecord(
        slot=3, shard=1, layer_digest="sha256:00", index="i", reference="r/x", blob_size=7
    )
    write_slot(str(tmp_path), record)
    result = CliRunner().invoke(main, ["report", "--root", str(tmp_path), "r/x", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert any("Shard 1 does not report its layers" in sentence for sentence in told["missing"])
    assert [layer["digest"] for layer in told["layers"]] == ["sha256:00"]
    result = CliRunner().invoke(main, ["report", "--root", str(tmp_path), "r/x", "-o", "-"])
    assert (result.exit_code, result.stdout[:15]) == (0, "<!DOCTYPE html>")
    assert sorted(os.listdir(tmp_path)) == ["slots"]  # a look changes nothing


def test_what_cannot_be_told_or_written(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(main, ["report", "--root", str(tmp_path), "r/none"])
    assert (unknown.exit_code, "no image r/none" in unknown.output) == (1, True)
    both = ["report", "--root", str(tmp_path), "r/none", "--json", "--output", "-"]
    assert CliRunner().invoke(main, both).exit_code == 2
