# SPDX-License-Identifier: Apache-2.0
"""containerd's own test suite for snapshotters, over gRPC, against a daemon of ours.

`LAZYSNAP_DAEMON` names another daemon to test: a command that takes `--root R --address S`, such as
`python -m tests.support.plain_daemon`, which needs no FUSE.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazysnap import mounts
from tests.support.golang import CONTAINERD, build

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.slow]

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
SUITE = CONTAINERD / "snapshots/testsuite"
LIMIT = 900  # seconds for the whole suite
CASES = (
    "Basic",
    "StatActive",
    "StatComitted",
    "TransitivityTest",
    "PreareViewFailingtest",
    "Update",
    "Remove",
    "Walk",
    "LayerFileupdate",
    "RemoveDirectoryInLowerLayer",
    "Chown",
    "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot",
    "DeletedFilesInChildSnapshot",
    "MoveFileFromLowerLayer",
    "Rename",
    "ViewReadonly",
    "StatInWalk",
    "CloseTwice",
    "RootPermission",
    "128LayersMount",
)
# containerd's own words: release 1.6 skips this case for every snapshotter
SKIPPED_BY_CONTAINERD = {"Rename": "rename test still fails on some kernels with overlay"}


@pytest.fixture(scope="module")
def binary() -> Path:
    """The suite as a program; built again only when its sources have changed."""
    return build(HERE, "test", "-c", watch=SUITE.glob("*.go"))


@pytest.fixture(scope="module")
def output(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the suite says when it has run once, all cases against one daemon each."""
    # the paths of sockets are limited to 107 bytes, and the suite adds to this one
    directory = tmp_path_factory.mktemp("cf")
    ours = f"{sys.executable} -m lazysnap serve --unmount-on-exit"
    process = subprocess.Popen(
        [binary, "-test.v", "-test.root", "-test.parallel=2"],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "LAZYSNAP_DAEMON": os.environ.get("LAZYSNAP_DAEMON", ours),
            "TMPDIR": str(directory),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the suite and its daemons
            process.communicate()
        left = mounts.unmount_below(str(directory))
    assert not left, f"{left} mounts were left behind"
    return text


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, output: str) -> None:
    results = re.findall(rf"^ *--- (PASS|FAIL|SKIP): TestSnapshotter/{case} ", output, re.MULTILINE)
    if case in SKIPPED_BY_CONTAINERD:
        # containerd's own suite skips it for every snapshotter, so there is nothing to pass
        assert results == ["SKIP"]
        assert SKIPPED_BY_CONTAINERD[case] in output
    else:
        assert results == ["PASS"], output


def test_no_case_is_missing(output: str) -> None:
    assert set(re.findall(r"TestSnapshotter/(\w+)", output)) == set(CASES)
