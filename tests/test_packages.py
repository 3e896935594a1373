# SPDX-License-Identifier: Apache-2.0
"""The maps of packages, in their docstrings, name each module once."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest


@pytest.mark.parametrize(
    "package", ["cache", "fetch", "formats", "index", "layers", "prefetch", "unpack"]
)
def test_a_map_names_each_module_once(package: str) -> None:
    module = importlib.import_module(f"lazysnap.{package}")
    lines = [line for line in (module.__doc__ or "").splitlines() if line.startswith("- ")]
    named = [name for line in lines for name in re.findall("`([a-z_]+)`", line.partition(":")[0])]
    also = re.findall(r"; `([a-z_]+)` adds", "\n".join(lines))
    assert sorted(named + also) == sorted(
        each.name for each in pkgutil.iter_modules(module.__path__)
    )
