# SPDX-License-Identifier: Apache-2.0
"""The snapshotter and its service, without anything that makes layers lazy.

`python -m tests.support.plain_daemon --root R --address S`; ends at SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal

import trio

from lazysnap import log
from lazysnap.service import serve
from lazysnap.snapshotter import Snapshotter
from lazysnap.store.snapshots import SnapshotStore


async def run(root: str, address: str) -> None:
    """Serve until SIGTERM."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        os.makedirs(root, mode=0o700, exist_ok=True)
        store = SnapshotStore(os.path.join(root, "metadata.db"))
        try:
            snapshotter = Snapshotter(root, store)
            async with trio.open_nursery() as nursery:
                await snapshotter.start(nursery)
                await nursery.start(serve, snapshotter, address)
                await anext(aiter(signals))
                nursery.cancel_scope.cancel()
            await snapshotter.aclose()
        finally:
            store.close()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--address", required=True)
    arguments = parser.parse_args()
    log.setup("debug")
    trio.run(run, arguments.root, arguments.address)


if __name__ == "__main__":
    main()
