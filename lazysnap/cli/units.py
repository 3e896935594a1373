# SPDX-License-Identifier: Apache-2.0
"""Sizes and durations as people write them: `10GiB`, `500MB`, `36h`. As callbacks of click's options."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

_SIZES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", 1):
    _SIZES[f"{_letter}b"] = 1000**_power
    _SIZES[_letter] = _SIZES[f"{_letter}ib"] = 1024**_power
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option: bytes. `MB` is a million; `MiB` and `M` are 1024 times 1024."""
    if value is None:
        return None
    return int(_quantity(value, _SIZES, "size; write it like 500MB or 10GiB"))


def duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Callback of an option: seconds, written with s, m, h, d or w behind the number."""
    if value is None:
        return None
    return _quantity(value, _SECONDS, "duration; write it like 90m, 36h or 14d")


def _quantity(value: str, units: Mapping[str, int], what: str) -> float:
    match = _QUANTITY.fullmatch(value.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise click.BadParameter(f"{value!r} is not a {what}")
    return float(match[1]) * factor
