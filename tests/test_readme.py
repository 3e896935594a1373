# SPDX-License-Identifier: Apache-2.0
"""What the README repeats of other files is the same there."""

from __future__ import annotations

import json
import re
from pathlib import Path

_TOP = Path(__file__).parent.parent
_README = (_TOP / "README.md").read_text()


def _block(text: str, heading: str) -> str:
    """The first block of code of a section."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    block: str = re.findall(r"^```\w*\n(.*?)^```", section, re.M | re.S)[0]
    return block


def test_its_installation_is_that_of_the_guide() -> None:
    guide = (_TOP / "docs" / "install.md").read_text()
    assert _block(_README, "Install") == _block(guide, "The package") + _block(guide, "The service")


def test_its_figures_of_starts_are_those_of_the_chart() -> None:
    runs = json.loads((_TOP / "docs" / "benchmarks" / "start.json").read_text())["runs"]
    for row, measure in (("first start", "start-py"), ("start known", "known-py")):
        (line,) = re.findall(rf"^\| {row}.*$", _README, re.M)
        cells = [cell.strip(" *").split(" / ") for cell in line.split("|")[2:5]]
        for side, cell in zip(("overlayfs", "stargz", "lazysnap"), cells, strict=True):
            shown = {
                run["network"]: run["values"]["first output [s]"]
                for run in runs
                if (run["measure"], run["side"]) == (measure, side)
            }
            if shown:  # overlayfs knows nothing of starts
                assert [float(text) for text in cell] == [
                    shown[n] for n in ("unlimited", "50", "10")
                ]
