# SPDX-License-Identifier: Apache-2.0
"""Numbers as the page shows them. Pure."""

from __future__ import annotations

from lazysnap.report.model import Layer


def seconds_text(number: float) -> str:
    """A duration."""
    if abs(number) < 1:
        return f"{number * 1000:.3g} ms" if number else "0 s"
    return f"{number:.2f} s" if abs(number) < 100 else f"{number:.0f} s"


def layer_text(layer: Layer, position: int) -> str:
    """A layer, by its place and the beginning of its digest."""
    digest = layer.digest.rpartition(":")[2][:12]
    return f"layer {position + 1}" + (f" ({digest})" if digest else "")
