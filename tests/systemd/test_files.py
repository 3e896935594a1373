# SPDX-License-Identifier: Apache-2.0
"""The files in systemd/ are what systemd, containerd and lazysnap understand."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from lazysnap.cli import config
from tests.systemd.machine import PROJECT

FILES = PROJECT / "systemd"


def test_the_sample_is_what_the_code_prints() -> None:
    """`lazysnap config default >systemd/config.toml` makes it so."""
    assert (FILES / "config.toml").read_text() == "\n".join(config.sample()) + "\n"


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    names = ("lazysnap.service", "lazysnap-store.service", "system-lazysnap.slice")
    for name in names:
        text = (FILES / name).read_text()
        # It would complain that this is not installed.
        (tmp_path / name).write_text(text.replace("/opt/lazysnap/bin/lazysnap", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.containerd
def test_containerd_understands_its_configuration(tmp_path: Path) -> None:
    command = ["containerd", "--config", str(FILES / "containerd.toml"), "config", "dump"]
    dump = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    taken = tomllib.loads(dump)
    assert taken["proxy_plugins"]["lazysnap"]["address"] == "/run/lazysnap/lazysnap.sock"
    cri = taken["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
    assert (cri["snapshotter"], cri["disable_snapshot_annotations"]) == ("lazysnap", False)
