# SPDX-License-Identifier: Apache-2.0
"""`lazysnap check` as a command: its output and exit codes, with nothing running."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lazysnap.check.everything import PROBES
from lazysnap.check.finding import Context, Finding, Level, Probe, failure, info, warning
from lazysnap.cli import check, main
from tests.check.scene import Scene, dead_process

KEYS = {"id", "level", "summary", "detail", "hint", "fixed"}


def _run(directory: Path, *options: str) -> Result:
    config = directory / "config.toml"
    if not config.exists():
        config.touch()
    arguments = ["check", "--config", str(config), "--root", str(directory / "r")]
    for name in ("address", "containerd", "containerd-config"):
        arguments += [f"--{name}", str(directory / name)]
    return CliRunner().invoke(main, [*arguments, *options])


def _only(monkeypatch: pytest.MonkeyPatch, findings: Sequence[Finding]) -> None:
    def look(_: Context) -> Sequence[Finding]:
        return findings

    monkeypatch.setattr(check, "PROBES", (Probe("one", "all is well", look),))


def test_json_has_all_probes_and_all_keys(tmp_path: Path) -> None:
    result = _run(tmp_path, "--json")
    assert result.exit_code == 2  # no daemon
    document = json.loads(result.stdout)
    assert list(dict.fromkeys(row["id"] for row in document)) == [probe.id for probe in PROBES]
    assert all(row.keys() == KEYS for row in document)
    assert all(isinstance(value, str) for row in document for value in row.values())
    assert {row["level"] for row in document} <= {level.value for level in Level}
    by_id = {row["id"]: row for row in document}
    assert by_id["daemon"]["level"] == by_id["containerd"]["level"] == "failure"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("findings", "code", "last"),
    [
        ([], 0, "0 failures, 0 warnings"),
        ([info("a")], 0, "0 failures, 0 warnings"),
        ([warning("a"), info("b")], 1, "0 failures, 1 warnings"),
        ([warning("a"), failure("b")], 2, "1 failures, 1 warnings"),
    ],
)
def test_exit_codes_and_the_last_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    findings: list[Finding],
    code: int,
    last: str,
) -> None:
    _only(monkeypatch, findings)
    result = _run(tmp_path)
    assert result.exit_code == code
    lines = result.stdout.splitlines()
    assert len(lines) == len(findings) + 1
    assert lines[-1] == last


def test_a_finding_is_one_line_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(monkeypatch, [failure("registry says \x1b[2Jno\nfailure  x: y", "why\r", "do\tthis")])
    first, _ = _run(tmp_path).stdout.split("\n")[:2]
    assert first.startswith("failure  one: registry says  [2Jno failure  x: y; why")
    assert first.endswith("-- do this")
    assert first.isprintable()


def test_a_bad_configuration_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("rooot = 3\n")
    result = _run(tmp_path, "--json")
    first = json.loads(result.stdout)[0]
    assert (first["id"], first["level"]) == ("config", "failure")
    assert "root" in first["hint"]
    assert result.exit_code == 2


def test_a_bad_reference_is_refused(tmp_path: Path) -> None:
    result = _run(tmp_path, "--image", "UPPER CASE")
    assert result.exit_code == 2
    assert "UPPER CASE" in result.output


def test_fixing_twice_finds_nothing_the_second_time(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    left = scene.root / f"shards/1.sock.{dead_process()}"
    left.touch()

    def found(*options: str) -> dict[str, str]:
        rows = json.loads(_run(tmp_path, "--json", *options).stdout)
        (row,) = [row for row in rows if row["id"] == "leftovers"]
        return {key: row[key] for key in ("level", "fixed")}

    assert found() == {"level": "warning", "fixed": ""}
    assert left.exists()
    assert found("--fix") == {"level": "warning", "fixed": "removed 1 files"}
    assert not left.exists()
    assert found("--fix") == {"level": "ok", "fixed": ""}
    scene.store.close()
