# SPDX-License-Identifier: Apache-2.0
"""The test support itself: a container of the busybox image really runs on overlayfs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.containerd import PrivateContainerd
from tests.support.images import busybox_layers, write_layout

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def test_a_container_runs_and_nothing_is_left(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "image", busybox_layers(), tag="localhost/busybox:1")
    archive = tmp_path / "image.tar"
    subprocess.run(["tar", "-C", layout.path, "-cf", archive, "."], check=True)
    with PrivateContainerd(tmp_path) as containerd:
        containerd.ctr("images", "import", "--base-name", "localhost/busybox", str(archive))
        [reference] = containerd.images()
        output = containerd.run(reference, "/bin/sh", "-c", "cat /data/hello; ls /data; id -u")
        assert output == "hello from the top layer\nhello\nmany\npayload\n0\n"
        assert list(containerd.snapshots()) == sorted(layout.chain_ids)
        assert layout.manifest in containerd.contents()
        with pytest.raises(RuntimeError, match="exit 3"):
            containerd.run(reference, "/bin/sh", "-c", "exit 3")
        pid = containerd.pid
    assert not Path(f"/proc/{pid}").exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
