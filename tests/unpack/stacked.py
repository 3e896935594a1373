# SPDX-License-Identifier: Apache-2.0
"""Layers that have to do with those below: what can go wrong when each is unpacked by itself."""

from __future__ import annotations

from tests.support import layers

LOW = [
    layers.directory("a", mode=0o711, uid=11, gid=12),
    layers.file("a/hidden", b"x"),
    layers.file("gone", b"x"),
]
HIGH: list[list[layers.LayerEntry]] = [
    [layers.whiteout("gone"), layers.file("a/b/new", b"its parents are left out")],
    [layers.opaque(""), layers.file("a/only", b"all else is hidden")],
    [layers.file("late/f", b"x"), layers.directory("late", mode=0o700)],
    [layers.file("a/b/c", b"x" * 3_000_000), layers.hardlink("a/b/d", "a/b/c")],
    [layers.whiteout("a/b/c"), layers.symlink("link", "a")],
]
