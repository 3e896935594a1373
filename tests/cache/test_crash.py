# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
import tempfile


def test_killed_at_every_step_it_leaves_only_right_bytes() -> None:
    # In memory, as it syncs a hundred times and the disk is everybody's.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tests.cache.crash", directory],
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["killed"] > 100
