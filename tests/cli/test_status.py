# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lazysnap.cli import main
from lazysnap.cli.images import images
from lazysnap.labels import CRI_IMAGE_REF, CRI_LAYER_DIGEST, REASON, REMOTE
from lazysnap.layers.slots import SlotRecord, write_slot
from lazysnap.overlay import Kind
from lazysnap.store.records import NO_LABELS, Snapshot
from tests.support.stack import Stack, stack, wait_until

CONFIG = "[shards]\ncount = 1\n[fetch]\nbackground = false\nlearn_profiles = false\n"


def _record(slot: int, reference: str = "r/x") -> SlotRecord:
    digest = f"sha256:{slot:064x}"
    return SlotRecord(
        slot=slot, shard=1, layer_digest=digest, index="i", reference=reference, blob_size=7
    )


def test_a_shard_that_does_not_answer_is_shown_with_its_layers(tmp_path: Path) -> None:
    write_slot(str(tmp_path), _record(3))
    (tmp_path / "slots" / "4").write_bytes(b"no record")
    (tmp_path / "metadata.db").write_bytes(b"no database")
    arguments = ["status", "--root", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert [(shard["shard"], bool(shard["error"])) for shard in shown["shards"]] == [(1, True)]
    (image,) = shown["images"]
    assert [(layer["slot"], layer["bytes"]) for layer in image["layers"]] == [(3, None)]
    assert len(shown["problems"]) == 2
    assert shown["daemon"] == {"running": False}
    text = CliRunner().invoke(main, arguments).stdout
    assert "slot 3: not known" in text
    assert text.count("problem: ") == 2
    assert sorted(os.listdir(tmp_path)) == ["metadata.db", "slots"]  # a look changes nothing


def test_a_root_without_anything_has_nothing_mounted(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", "--root", str(tmp_path)])
    assert (result.exit_code, "\n0 lazy layers" in result.stdout) == (0, True)
    missing = CliRunner().invoke(main, ["status", "--root", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2


def _snapshot(
    number: int,
    name: str,
    parent: str,
    labels: Mapping[str, str] = NO_LABELS,
    kind: Kind = Kind.COMMITTED,
) -> Snapshot:
    return Snapshot(number, name, kind, parent, 0, 0, None, labels)


def test_layers_belong_to_every_image_that_is_built_on_them() -> None:
    one, two = {CRI_IMAGE_REF: "one"}, {CRI_IMAGE_REF: "two", REMOTE: "y"}
    snapshots = [
        _snapshot(1, "base", "", {**one, CRI_LAYER_DIGEST: "sha256:b", REMOTE: "y"}),
        _snapshot(2, "one-top", "base", {**one, REASON: "no-toc"}),
        _snapshot(3, "two-top", "base", two),
        _snapshot(4, "two-more", "two-top", {REASON: "no-toc-digest"}),  # a client left no name
        _snapshot(5, "default/7/box", "two-more", {CRI_IMAGE_REF: "not this"}, Kind.ACTIVE),
        _snapshot(6, "default/8/view", "base", kind=Kind.VIEW),
        _snapshot(7, "ordinary", ""),
        _snapshot(8, "built", "one-top"),
    ]
    records = {11: _record(11), 13: _record(13), 14: _record(14, "r/z")}
    found, others = images(snapshots, records, {1: 11, 3: 13})
    assert [(image.reference, [layer.snapshot for layer in image.layers]) for image in found] == [
        ("one", ["base", "one-top"]),
        ("r/z", [""]),  # a slot that the database does not know
        ("two", ["base", "two-top", "two-more"]),
    ]
    first, _, last = (image.layers for image in found)
    assert [(layer.slot, layer.reason) for layer in first] == [(11, ""), (0, "no-toc")]
    assert [layer.used_by for layer in last] == [
        ("default/7/box", "default/8/view"),
        ("default/7/box",),
        ("default/7/box",),
    ]
    assert others == 2


def _status(it: Stack, *options: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "lazysnap", "status", "--root", str(it.lazysnap.root)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    return done.stdout


def _json(it: Stack, code: int = 0) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(_status(it, "--json", code=code))
    return shown


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_what_was_read_is_local(tmp_path: Path) -> None:
    with stack(tmp_path, config=CONFIG) as it:
        payload = b"payload" * 300_000
        reference = it.push_busybox("lazy", ["estargz", "estargz", "plain"], payload=payload)
        pulled = it.pull(reference)
        it.run(reference, "cat", "/data/payload")
        name = f"status-user-{os.urandom(6).hex()}"  # known to the whole machine
        it.containerd.ctr(
            *("run", "-d", "--snapshotter", "lazysnap", reference, name, "sleep", "600")
        )
        shown = _json(it)
        (image,) = shown["images"]
        assert image["reference"] == reference
        assert [layer["layer"] for layer in image["layers"]] == [
            layer["digest"] for layer in pulled["layers"]
        ]
        assert [layer["lazy"] for layer in image["layers"]] == [True, True, False]
        assert image["layers"][2]["reason"] == "no-toc-digest"
        (user,) = (key for key in image["usedBy"] if key.endswith(f"/{name}"))
        assert user.startswith("default/")
        for layer in image["layers"][:2]:
            assert 0 <= layer["localBytes"] <= layer["bytes"]
            assert layer["errors"] == 0
            assert sum(layer["fetched"].values()) == layer["fetchedBytes"]
        assert any(layer["lastReadSecondsAgo"] is not None for layer in image["layers"])
        assert shown["totals"]["localBytes"] >= len(payload)
        assert shown["totals"]["requests"] > 0
        assert shown["daemon"]["pid"] == it.lazysnap.pid
        assert shown["totals"]["fetchedBytes"] > 0
        assert shown["network"]["receivedBytes"] > 0
        assert shown["cache"]["bytes"] >= len(payload)
        text = _status(it)
        assert f"{reference}: 2 of 3 layers lazy, used by default/" in text
        assert f"default/{name}" in text
        assert "unpacked: no-toc-digest" in text
        _without_daemon_and_shards(it, shown)


def _without_daemon_and_shards(it: Stack, before: dict[str, Any]) -> None:
    it.lazysnap.stop()
    stopped = _json(it)
    assert stopped["daemon"] == {"running": False}
    # Something may still have been on its way, ahead of a reader.
    for key in ("localBytes", "fetchedBytes"):
        assert stopped["totals"][key] >= before["totals"][key] > 0
    assert stopped["totals"]["bytes"] == before["totals"]["bytes"]
    it.lazysnap.kill_shards()
    dead = _json(it, code=1)
    assert dead["shards"][0]["error"]
    assert dead["totals"]["localBytes"] >= stopped["totals"]["localBytes"]
    assert dead["images"][0]["layers"][0]["requests"] is None
    assert "shard 0 does not answer" in _status(it, code=1)


def test_watching_goes_on_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lazysnap", "status", "--root", str(tmp_path)]
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--watch", "--json", "--interval", "0.1"], stdout=file, stderr=file
        )
    try:
        wait_until(lambda: output.read_bytes().count(b"\n") >= 2)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    for line in output.read_text().splitlines():
        assert json.loads(line)["images"] == []
