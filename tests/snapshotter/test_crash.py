# SPDX-License-Identifier: Apache-2.0
"""A crash at any line leaves the old state or the new, and nothing that the next start keeps.

Every fourth line by default; `LAZYSNAP_EXHAUSTIVE=1` tries all, in a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.root
@pytest.mark.slow
def test_a_crash_at_any_line(tmp_path: Path) -> None:
    every = 1 if "LAZYSNAP_EXHAUSTIVE" in os.environ else 4
    # a mount namespace of its own, with a file system in memory: some hundred databases are made
    script = f"mount -t tmpfs none {tmp_path} && exec {sys.executable} -m tests.snapshotter.crash"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{script} {tmp_path} {every}"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["crashed"] > 200
