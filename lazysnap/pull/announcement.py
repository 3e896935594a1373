# SPDX-License-Identifier: Apache-2.0
"""Tells the daemon of this node which image is about to be pulled.

It begins to open the layers while Python still loads what a pull needs; so this module loads next to
nothing. What the daemon answers is taken up in `announced`.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from lazysnap import frames
from lazysnap.platforms import Platform
from lazysnap.reference import Reference

# The daemon is on this machine, so it listens or there is none.
_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Announcement:
    """An image that the daemon was told of.

    Attributes:
        reference: of the image.
        platform: that will be pulled.
        path: of the daemon's socket.
        connection: where it answers; belongs to whoever has this.
    """

    reference: Reference
    platform: Platform
    path: str
    connection: socket.socket


def announce(root: str, reference: Reference, platform: Platform) -> Announcement | None:
    """Tell the daemon.

    Args:
        root: lazysnap's root directory.
        reference: of the image.
        platform: that will be pulled.

    Returns:
        None if there is no daemon, which is no reason not to pull.
    """
    path = os.path.join(root, "daemon.sock")
    arguments = {"reference": reference.name, "platform": str(platform)}
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    try:
        connection.connect(path)
        connection.sendall(frames.pack({"call": "announce", "args": arguments}))
    except OSError:
        connection.close()
        return None
    connection.setblocking(False)
    return Announcement(reference, platform, path, connection)
