# SPDX-License-Identifier: Apache-2.0
"""The chart of starts: what it shows, and that the pictures in docs/images are drawn from their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

from .chart import DARK, LIGHT, chart, files

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_MACHINE = {"cpu": "a CPU", "cores": 2, "kernel": "6.18", "containerd": "1.6.20"}
_SVG = "{http://www.w3.org/2000/svg}"


def _run(measure: str, network: str, side: str, **values: float) -> dict[str, Any]:
    return {"measure": measure, "network": network, "side": side, "values": values, "error": ""}


def _start(measure: str, network: str, side: str, seconds: float) -> dict[str, Any]:
    return _run(measure, network, side, **{"first output [s]": seconds})


def _document(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"machine": _MACHINE, "titles": {}, "runs": list(runs)}


def _drawn(*runs: dict[str, Any]) -> Element:
    return fromstring(chart(_document(*runs), LIGHT))


def _texts(drawing: Element) -> list[str]:
    return [text.text or "" for text in drawing.iter(f"{_SVG}text")]


def _widths(drawing: Element) -> list[float]:
    return [float(bar.attrib["width"]) for bar in drawing.iter(f"{_SVG}rect")]


def test_the_pictures_are_drawn_from_their_figures() -> None:
    document = json.loads((_DOCS / "benchmarks" / "start.json").read_text())
    for name, drawing in files(document, "start"):
        assert (_DOCS / "images" / name).read_text() == drawing


def test_bars_are_as_long_as_their_medians() -> None:
    drawing = _drawn(
        *(_start("start-py", "10", "overlayfs", seconds) for seconds in (39.0, 40.0, 90.0)),
        _start("start-py", "10", "lazysnap", 10.0),
    )
    longest, shortest = _widths(drawing)
    assert longest == pytest.approx(4 * shortest, abs=0.1)
    assert {"40.0", "10.0"} <= set(_texts(drawing))


def test_networks_come_in_the_order_of_the_benchmark() -> None:
    drawing = _drawn(
        _start("start-py", "10", "lazysnap", 1.0), _start("start-py", "unlimited", "lazysnap", 1.0)
    )
    networks = [text for text in _texts(drawing) if text.startswith("network")]
    assert networks == ["network: unlimited", "network: 10 MB/s, 30 ms"]


def test_a_known_start_has_bars_of_its_own_but_not_of_overlayfs() -> None:
    drawing = _drawn(
        _start("known-py", "50", "overlayfs", 3.0),
        _start("known-py", "50", "lazysnap", 1.0),
        _start("start-py", "50", "overlayfs", 3.0),
        _start("start-py", "50", "lazysnap", 2.0),
    )
    labels = [text for text in _texts(drawing) if text.startswith(("overlayfs", "lazysnap"))]
    assert labels == ["overlayfs", "lazysnap", "lazysnap, start known by a profile"]


def test_other_measurements_and_failed_runs_are_left_out() -> None:
    drawing = _drawn(
        _start("start-py", "50", "lazysnap", 2.0),
        _run("start-py", "50", "overlayfs"),
        _run("walk", "unlimited", "lazysnap", **{"first [s]": 1.0}),
    )
    assert len(_widths(drawing)) == 1


def test_starts_of_several_images_are_refused() -> None:
    with pytest.raises(ValueError, match="one image"):
        _drawn(
            _start("start-py", "50", "lazysnap", 2.0), _start("start-gcc", "50", "lazysnap", 2.0)
        )
    with pytest.raises(ValueError, match="one image"):
        _drawn()


def test_themes_differ_in_colours_only() -> None:
    document = _document(_start("start-py", "50", "lazysnap", 2.0))
    light, dark = chart(document, LIGHT), chart(document, DARK)
    assert light != dark
    for name in ("text", "dim", "other", "own"):
        dark = dark.replace(getattr(DARK, name), getattr(LIGHT, name))
    assert dark == light
