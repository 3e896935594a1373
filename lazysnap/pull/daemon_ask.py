# SPDX-License-Identifier: Apache-2.0
"""Asks the daemon of this node to pull an image; `daemon_client` follows what it does then.

The daemon has loaded what a pull needs. A command has not, and would take a quarter of a second for that,
as long as all the rest. So this module loads next to nothing: the daemon is at work while the command
loads what it takes to follow it.
"""

from __future__ import annotations

import socket

from lazysnap import frames
from lazysnap.paths import Root

# The daemon is on this machine, so it listens or there is none.
_SECONDS = 0.2


def ask(root: str, reference: str, platform: str, **place: str) -> socket.socket | None:
    """Ask the daemon to pull an image of which all layers are lazy.

    Args:
        root: lazysnap's root directory.
        reference: of the image, as people type it.
        platform: which of the image's platforms, as people type it.
        place: where the image goes: `address` of containerd's socket, `namespace`, `snapshotter`.

    Returns:
        The connection, for a `Delegation`; None if there is no daemon, which is no reason not to pull.
    """
    arguments = {"reference": reference, "platform": platform, **place}
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    try:
        connection.connect(Root(root).daemon_socket)
        connection.sendall(frames.pack({"call": "pull", "args": arguments}))
    except OSError:
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection
