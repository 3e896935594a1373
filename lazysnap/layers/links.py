# SPDX-License-Identifier: Apache-2.0
"""Follows symbolic links in any tree, as the kernel does. Pure.

Two other walks stay apart on purpose: `unpack.root` opens and makes directories of a disk, and
`index.tree` makes those that a layer does not list. Both have containerd's limit of links and one more
for all steps, as what they are given is hostile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

# As the kernel's own limit for links in one path.
_MAX_LINKS = 40

Place = TypeVar("Place")


class Link(NamedTuple):
    """A symbolic link.

    Attributes:
        target: as it is written in the link.
    """

    target: bytes


def follow(
    names: Sequence[bytes], top: Place, step: Callable[[Place, bytes], Place | Link | None]
) -> list[Place] | None:
    """Walk along a path.

    Args:
        names: of the path, from `top`.
        top: the root of the tree, which `..` and absolute links do not leave.
        step: what has a name in a place: another place, or a link; None if there is nothing.

    Returns:
        The places on the way without links, from `top` on; None if the path leads nowhere, or through
        more than 40 links.
    """
    way = [top]
    left = list(reversed(names))
    links = 0
    while left:
        name = left.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            del way[max(len(way) - 1, 1) :]
            continue
        found = step(way[-1], name)
        if found is None:
            return None
        if not isinstance(found, Link):
            way.append(found)
            continue
        links += 1
        if links > _MAX_LINKS:
            return None
        if found.target.startswith(b"/"):
            del way[1:]
        left.extend(reversed(found.target.split(b"/")))
    return way
