# SPDX-License-Identifier: Apache-2.0
"""The table of formats in CHANGELOG.md tells the versions that the code has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import lazysnap
from lazysnap.erofs import trailer
from lazysnap.index import layout
from lazysnap.layers import blob_tail, slots, store_names, tree_images
from lazysnap.prefetch import profile
from lazysnap.store import schema

_PROJECT = Path(__file__).parent.parent
_CHANGELOG = (_PROJECT / "CHANGELOG.md").read_text()


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


def test_one_release_is_named_everywhere() -> None:
    project = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lazysnap.__version__
    # A daemon replaces workers of another release only: what follows a release must differ from it.
    released = re.findall(r"^## (\S+)$", _CHANGELOG, re.M)
    assert ("Unreleased" in released) == ("dev" in lazysnap.__version__)
    assert lazysnap.__version__ not in released or "Unreleased" not in released
