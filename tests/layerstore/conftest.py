# SPDX-License-Identifier: Apache-2.0
"""A scene for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layerstore.scene import Scene, scene


@pytest.fixture
def it() -> Iterator[Scene]:
    # Podman takes no directory whose path is longer than 50 characters, and pytest's are.
    directory = Path(tempfile.mkdtemp(prefix="lazysnap-"))
    try:
        with scene(directory) as found:
            yield found
    finally:
        shutil.rmtree(directory)
