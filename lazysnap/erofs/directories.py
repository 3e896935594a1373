# SPDX-License-Identifier: Apache-2.0
"""The blocks of directories: names split over blocks, and each block's bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from lazysnap.erofs.layout import BLOCK, DIRENT, DIRENT_SIZE, MAX_NAME
from lazysnap.errors import FormatError

DOTS = (b".", b"..")
_DOTS_SIZE = 3 + 2 * DIRENT_SIZE


def measure(names: Sequence[bytes]) -> tuple[int, int]:
    """How many full blocks a directory has, and how many bytes are in its last one.

    Args:
        names: sorted by their bytes, without the two dots.
    """
    size = sum(map(len, names)) + len(names) * DIRENT_SIZE + _DOTS_SIZE
    if size <= BLOCK:
        return 0, size
    full = list(names)
    add_dots(full, [0] * len(names), 0, 0)
    ends = split(full)
    last = full[ends[-2] :] if len(ends) > 1 else full
    return len(ends) - 1, sum(map(len, last)) + len(last) * DIRENT_SIZE


def add_dots(names: list[bytes], nodes: list[int], own: int, parent: int) -> None:
    """Put `.` and `..` into a sorted directory.

    Args:
        names: sorted by their bytes.
        nodes: what they lead to.
        own: the directory.
        parent: the directory above.
    """
    for name, node in zip(DOTS, (own, parent), strict=True):
        at = bisect_left(names, name) if names and names[0] < name else 0
        names.insert(at, name)
        nodes.insert(at, node)


def split(names: Sequence[bytes]) -> list[int]:
    """Where each block ends, as positions behind its last name; as many names to a block as fit."""
    ends: list[int] = []
    used = 0
    for position, length in enumerate(map(len, names)):
        used += DIRENT_SIZE + length
        if used > BLOCK:
            ends.append(position)
            used = DIRENT_SIZE + length
    ends.append(len(names))
    return ends


def block(names: Sequence[bytes], nids: Iterable[int], types: Iterable[int]) -> bytes:
    """The bytes of one block, without padding."""
    offsets = accumulate(map(len, names), initial=len(names) * DIRENT_SIZE)
    return b"".join([*map(DIRENT.pack, nids, offsets, types), *names])


def check_names(names: Sequence[bytes]) -> None:
    """Refuse names that no file can have. An index that was made from a layer holds none.

    Raises:
        FormatError: there are some.
    """
    together = b"".join(names)
    lengths = [len(name) for name in names]
    if names and (
        min(lengths) == 0
        or max(lengths) > MAX_NAME
        or b"/" in together
        or b"\0" in together
        or not set(DOTS).isdisjoint(names)
    ):
        raise FormatError("layer index is damaged: impossible name", reason="bad-index")
