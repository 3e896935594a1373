# SPDX-License-Identifier: Apache-2.0
"""The cache on disk: verified file contents, named by what they contain."""

from __future__ import annotations

import os

from lazysnap.cache.objects import ObjectStore
from lazysnap.cache.partial import PartialFile

__all__ = ["INDEX_TAIL", "Cache", "ObjectStore", "PartialFile"]

INDEX_TAIL = ".tail"
"""Suffix of files beside an index, see `lazysnap.layers.seed`; of no use without it."""


class Cache:
    """The parts of the cache below one directory.

    Args:
        root: the directory, e.g. `/var/lib/lazysnap/cache`; created when missing.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.index = os.path.join(self.root, "index")
        self.partial = os.path.join(self.root, "partial")
        self.trees = os.path.join(self.root, "trees")
        for directory in (self.root, self.index, self.partial, self.trees):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self.objects = ObjectStore(
            os.path.join(self.root, "objects"), os.path.join(self.root, "fresh")
        )
