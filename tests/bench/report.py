# SPDX-License-Identifier: Apache-2.0
"""Tables and JSON of what was measured, with the machine it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from .origin import NETWORKS
from .plan import Measure, Run
from .scene import OVERLAYFS

_KEY = re.compile(r"(.+) \[(.+)\]")


def machine() -> dict[str, Any]:
    """What a number depends on."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    version = subprocess.run(
        ["containerd", "--version"], capture_output=True, text=True, check=True
    )
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "containerd": version.stdout.split()[2],
    }


def document(
    measures: Sequence[Measure], runs: Sequence[Run], about: dict[str, Any]
) -> dict[str, Any]:
    """Everything, for JSON: each run, not only medians."""
    return {
        "machine": about,
        "titles": {one.name: one.title for one in measures},
        "runs": [asdict(run) for run in runs],
    }


def rows(measures: Iterable[Measure], runs: Sequence[Run]) -> list[list[str]]:
    """A header, and a row for each value: what, then each side's median, then their ratios."""
    sides = list(dict.fromkeys(run.side for run in runs))
    others = [side for side in sides if side != OVERLAYFS] if OVERLAYFS in sides else []
    table = [["", "", *sides, *(f"{side} / {OVERLAYFS}" for side in others)]]
    for measure in measures:
        for network in measure.networks:
            of_cell = [r for r in runs if (r.measure, r.network) == (measure.name, network)]
            title = measure.title
            if len(measure.networks) > 1:
                title += f", {NETWORKS[network].title}"
            for key in dict.fromkeys(key for run in of_cell for key in run.values):
                medians = {side: _median(of_cell, side, key) for side in sides}
                cells = [_cell(of_cell, side, key, medians[side]) for side in sides]
                ratios = [_ratio(medians[side], medians[OVERLAYFS]) for side in others]
                table.append([title, key, *cells, *ratios])
            failed = {run.side for run in of_cell if run.error}
            if failed:
                cells = ["failed" if side in failed else "" for side in sides]
                table.append([title, "", *cells, *("" for _ in others)])
    return table


def plain(table: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines, before = [], ""
    for row in table:
        shown = [row[0] if row[0] != before else "", *row[1:]]
        before = row[0]
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(shown, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table for a README."""
    head, *body = table
    rule = ["---", "---", *("---:" for _ in head[2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def about(machine: dict[str, Any], runs: Sequence[Run], count: int) -> str:
    """A line that names the machine, how it was measured, and how busy the machine was."""
    loads = [run.load for run in runs] or [0.0]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, Linux "
        f"{machine['kernel']}, containerd {machine['containerd']}. Medians of {count} runs, sides in "
        f"turn, spread in brackets; load average {min(loads):.1f} to {max(loads):.1f}."
    )


def _values(runs: Iterable[Run], side: str, key: str) -> list[float]:
    return [run.values[key] for run in runs if run.side == side and key in run.values]


def _median(runs: Sequence[Run], side: str, key: str) -> float | None:
    values = _values(runs, side, key)
    return median(values) if values else None


def _cell(runs: Sequence[Run], side: str, key: str, middle: float | None) -> str:
    if middle is None:
        return ""
    values = _values(runs, side, key)
    spread = f" ({_number(min(values))} - {_number(max(values))})"
    return _number(middle) + (spread if len(values) > 1 else "")


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else ""
