# SPDX-License-Identifier: Apache-2.0
"""A scene for each test, which must leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.standalone.scene import Scene, scene


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as it:
        yield it
