# SPDX-License-Identifier: Apache-2.0
"""What `lazysnap pull` does while the daemon pulls."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from lazysnap import log
from lazysnap.cli import pull_output
from lazysnap.errors import LazysnapError
from lazysnap.pull.daemon_client import Delegation
from lazysnap.pull.progress import PullResult

_log = log.get(__name__)


def follow(connection: socket.socket) -> tuple[PullResult | None, Mapping[str, Any] | None]:
    """Show the progress of a pull by the daemon, to its end.

    Args:
        connection: on which the daemon was asked.

    Returns:
        What it did, None if it cannot pull the image; and the image's documents, if it told them.
    """
    delegation = Delegation(connection)
    result = None
    try:
        with pull_output.progress() as progress:
            result = delegation.follow(progress)
    except LazysnapError as error:
        # Whatever is wrong with the image will be said by who tries next.
        _log.debug("the daemon does not pull", error=error)
    return result, delegation.documents
