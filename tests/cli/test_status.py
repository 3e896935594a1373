# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazysnap.cli import main
from lazysnap.layers.slots import SlotRecord, write_slot
from tests.support.stack import stack


def test_a_shard_that_does_not_answer_is_shown_with_its_layers(tmp_path: Path) -> None:
    record = SlotRecord(
        slot=3, shard=1, layer_digest="sha256:" + "a" * 64, index="i", reference="r/x", blob_size=7
    )
    write_slot(str(tmp_path), record)
    (tmp_path / "slots" / "4").write_bytes(b"no record")
    arguments = ["status", "--root", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert [(shard["shard"], bool(shard["error"])) for shard in shown["shards"]] == [(1, True)]
    assert [(layer["slot"], layer["bytes"]) for layer in shown["layers"]] == [(3, None)]
    assert len(shown["unreadable"]) == 1
    assert "slot 3: not known" in CliRunner().invoke(main, arguments).stdout


def test_a_root_without_anything_has_nothing_mounted(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", "--root", str(tmp_path)])
    assert (result.exit_code, result.stdout.startswith("0 layers")) == (0, True)
    missing = CliRunner().invoke(main, ["status", "--root", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_what_was_read_is_local(tmp_path: Path) -> None:
    with stack(tmp_path, config="[fetch]\nbackground = false\n") as it:
        reference = it.push_busybox("lazy", ["estargz"] * 3, payload=b"payload" * 300_000)
        it.pull(reference)
        it.run(reference, "cat", "/data/payload")
        command = [sys.executable, "-m", "lazysnap", "status", "--root", it.lazysnap.root]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        shown = json.loads(done.stdout)
        assert len(shown["layers"]) == 3
        assert {layer["layer"] for layer in shown["layers"]} == {
            layer["digest"] for layer in it.pull(reference)["layers"]
        }
        for layer in shown["layers"]:
            assert 0 <= layer["localBytes"] <= layer["bytes"]
            assert layer["errors"] == 0
        assert shown["totals"]["localBytes"] >= 7 * 300_000
        assert shown["totals"]["requests"] > 0
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "3 layers: " in text
