# SPDX-License-Identifier: Apache-2.0
"""The table of formats in CHANGELOG.md tells the versions that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lazysnap.erofs import trailer
from lazysnap.index import layout
from lazysnap.layers import blob_tail, slots, store_names, tree_images
from lazysnap.prefetch import profile
from lazysnap.store import schema

_CHANGELOG = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("what", "version"),
    [
        ("index of a layer", f"{layout.VERSION}"),
        ("tree image", f"{tree_images._VERSION}, in its name"),
        ("trailer of a tree image", f"magic `{trailer.MAGIC.decode()}`"),
        ("blob tail", f"magic `{blob_tail._MAGIC.decode()}`"),
        ("slot record", f"{slots._VERSION}"),
        ("name in the store of `lazysnap store`", f"{store_names._VERSION}"),
        ("profile", f"{profile.VERSION}"),
        ("database", f"{len(schema._MIGRATIONS)}"),
    ],
)
def test_it_tells_the_version(what: str, version: str) -> None:
    (row,) = re.findall(rf"^\| {re.escape(what)} \|.*$", _CHANGELOG, re.M)
    assert row.split("|")[3].strip() == version


def test_profiles_are_stored_in_registries_by_their_type() -> None:
    assert f"`{profile.ARTIFACT_TYPE}`" in _CHANGELOG
