# SPDX-License-Identifier: Apache-2.0
"""Looking for profiles in a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazysnap.digest import Digest
from lazysnap.filesystem.profile_finder import ProfileFinder
from lazysnap.reference import Reference
from lazysnap.registry import Registry


async def test_a_defect_is_logged_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The task is one of the daemon's own: what it raises would end the daemon."""
    async with Registry() as registry:
        del registry.exchange
        finder = ProfileFinder(str(tmp_path), registry, enabled=True)
        manifest = Digest.of(b"")
        await finder.look(Reference.parse("registry.test/x:1"), manifest)
        await finder.settled(manifest, 60)
    assert "no profile from the registry" in caplog.text
    assert "AttributeError" in caplog.text
