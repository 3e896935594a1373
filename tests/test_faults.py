# SPDX-License-Identifier: Apache-2.0
"""The table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

_TOP = Path(__file__).parent.parent


def test_every_fault_has_its_test() -> None:
    rows = [
        line for line in (_TOP / "docs" / "faults.md").read_text().splitlines() if "`test_" in line
    ]
    sources = "".join(path.read_text() for path in (_TOP / "tests").rglob("test_*.py"))
    exist = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(rows) > 20
    assert named - exist == set()
