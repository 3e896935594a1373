# SPDX-License-Identifier: Apache-2.0
"""The test support itself: a container of the busybox image really runs on overlayfs, and is heard."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.support.containerd import PrivateContainerd
from tests.support.images import Layout, busybox_layers, write_layout

pytestmark = [pytest.mark.root, pytest.mark.containerd]


# Copies what a container writes at some 800 KB/s.
_SLOW_CTR = """\
#!/bin/sh
exec strace -f -o /dev/null -e trace=read,write,splice -e inject=read,write,splice:delay_exit=10000 ctr "$@"
"""


def _import(containerd: PrivateContainerd, directory: Path) -> tuple[Layout, str]:
    layout = write_layout(directory / "image", busybox_layers(), tag="localhost/busybox:1")
    archive = directory / "image.tar"
    subprocess.run(["tar", "-C", layout.path, "-cf", archive, "."], check=True)
    containerd.ctr("images", "import", "--base-name", "localhost/busybox", archive)
    [reference] = containerd.images()
    return layout, reference


def test_a_container_runs_and_nothing_is_left(tmp_path: Path) -> None:
    with PrivateContainerd(tmp_path) as containerd:
        layout, reference = _import(containerd, tmp_path)
        output = containerd.run(reference, "/bin/sh", "-c", "cat /data/hello; ls /data; id -u")
        assert output == "hello from the top layer\nhello\nmany\npayload\n0\n"
        assert list(containerd.snapshots()) == sorted(layout.chain_ids)
        assert layout.manifest in containerd.contents()
        with pytest.raises(RuntimeError, match="exit code 3"):
            containerd.run(reference, "/bin/sh", "-c", "exit 3")
        pid = containerd.pid
    assert not Path(f"/proc/{pid}").exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_slow_ctr_loses_nothing_of_what_a_container_writes(tmp_path: Path) -> None:
    """On a busy machine every ctr is slow; by its own pipes it would lose the end of this each time."""
    slow = tmp_path / "slow-ctr"
    slow.write_text(_SLOW_CTR)
    slow.chmod(0o755)
    script = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo complaint >&2; echo end"
    with PrivateContainerd(tmp_path) as containerd:
        _, reference = _import(containerd, tmp_path)
        began = time.monotonic()
        ended = containerd.run_to_end(reference, "sh", "-c", script, client=str(slow))
    assert ended.status == 0, ended.complaints
    # The two streams are copied side by side.
    assert ended.output.count("complaint\n") == 1
    assert ended.output.replace("complaint\n", "") == "x" * 300_000 + "\nend\n"
    assert ended.first_output is not None
    assert began < ended.first_output < time.monotonic()
