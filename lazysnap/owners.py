# SPDX-License-Identifier: Apache-2.0
"""Which users and groups files can belong to here, and who stands in for the others.

Root of a user namespace has the ids that are mapped into it, and an ordinary user has its own. The files of
all others belong to who looks at the image, as if that user had unpacked it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_ALL = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Owners:
    """The ids that there are.

    Args:
        users: ranges of them.
        groups: likewise.
        user: owns what belongs to a user that is not there.
        group: likewise.
    """

    users: tuple[range, ...]
    groups: tuple[range, ...]
    user: int
    group: int

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        """Who is to own what belongs to a user and a group."""
        return (
            uid if any(uid in ids for ids in self.users) else self.user,
            gid if any(gid in ids for ids in self.groups) else self.group,
        )


def possible_owners() -> Owners | None:
    """The ids that this process can give to files; None if these are all."""
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        return Owners((range(user, user + 1),), (range(group, group + 1),), user, group)
    users, groups = _mapped("uid_map"), _mapped("gid_map")
    if len(users[0]) >= _ALL and len(groups[0]) >= _ALL:
        return None
    return Owners(users, groups, user, group)


def _mapped(name: str) -> tuple[range, ...]:
    """The ids that our user namespace has (user_namespaces(7))."""
    found = []
    try:
        with open(f"/proc/self/{name}", encoding="ascii") as file:
            for line in file:
                first, _, count = (int(word) for word in line.split())
                found.append(range(first, first + count))
    except OSError:  # a kernel without user namespaces
        pass
    return tuple(found) or (range(_ALL),)
