# SPDX-License-Identifier: Apache-2.0
"""Follows symbolic links in any tree, as the kernel does. Pure.

Two other walks stay apart on purpose: `unpack.root` opens and makes directories of a disk, and
`index.tree` makes those that a layer does not list. Both have containerd's limit of links and one more
for all steps, as what they are given is hostile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from lazysnap.errors import NotLazy

# As the kernel's own limit for links in one path.
_MAX_LINKS = 40

Place = TypeVar("Place")


class Link(NamedTuple):
    """A symbolic link.

    Attributes:
        target: as it is written in the link.
    """

    target: bytes


class TooManySteps(NotLazy):
    """A tree has been searched for so long that somebody must have made it for that."""

    default_reason = "too-costly"


class Steps:
    """A budget for searches in trees that are not trusted.

    A path has up to 2,048 names, a link as many, and a path leads through 40 links: whoever bounds the
    number of paths has bounded nothing.

    Args:
        left: how many steps are allowed: names of paths, and looks into directories.
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int = 1) -> None:
        """Use up steps.

        Raises:
            TooManySteps: there are not so many left.
        """
        self.left -= count
        if self.left < 0:
            raise TooManySteps("the trees of these layers have links that take too long to follow")


def follow(
    names: Sequence[bytes],
    top: Place,
    step: Callable[[Place, bytes], Place | Link | None],
    steps: Steps,
) -> list[Place] | None:
    """Walk along a path.

    Args:
        names: of the path, from `top`.
        top: the root of the tree, which `..` and absolute links do not leave.
        step: what has a name in a place: another place, or a link; None if there is nothing.
        steps: of which each name takes one.

    Returns:
        The places on the way without links, from `top` on; None if the path leads nowhere, or through
        more than 40 links.

    Raises:
        TooManySteps: the budget is used up.
    """
    return follow_on([top], names, step, steps)


def follow_on(
    way: Sequence[Place],
    names: Sequence[bytes],
    step: Callable[[Place, bytes], Place | Link | None],
    steps: Steps,
) -> list[Place] | None:
    """As `follow`, from a place that is not the root.

    Args:
        way: the places on the way there, as `follow` returns them.
        names: of the path, from there.
        step: as above.
        steps: as above.
    """
    way = list(way)
    left = list(reversed(names))
    links = 0
    while left:
        name = left.pop()
        steps.take()
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
