# SPDX-License-Identifier: Apache-2.0
"""Takes everything of a root down but the cache, when nothing is mounted any more.

What a command left that was killed may be anything: a shard that just starts, a process that still
unpacks. So what is found is ended and removed until nothing is found.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal

import trio

from lazysnap import log, mounts
from lazysnap.errors import Internal, LazysnapError
from lazysnap.paths import Root
from lazysnap.snapshotter import directory_tree
from lazysnap.standalone.processes import serving_processes
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.05


async def take_down(root: str, supervisor: Supervisor) -> None:
    """Unmount, end and remove everything but the cache and the database.

    Args:
        root: taken; its database has no snapshots.
        supervisor: of its shards.

    Raises:
        Internal: something cannot be removed.
    """
    await trio.to_thread.run_sync(_unmount_views, root)
    await supervisor.stop()
    deadline = trio.current_time() + _PATIENCE_SECONDS
    while True:
        try:
            if not await trio.to_thread.run_sync(_end_processes, root):
                await trio.to_thread.run_sync(_remove, root)
                return
        except LazysnapError as error:
            if trio.current_time() > deadline:
                raise
            _log.debug("some processes or mounts have not gone yet", error=error)
        if trio.current_time() > deadline:
            raise Internal(f"processes of {root} do not end")
        await trio.sleep(_POLL_SECONDS)


def _unmount_views(root: str) -> None:
    # Before the shards, so that none of these waits for one that has ended.
    for path in (Root(root).merged, Root(root).snapshots):
        mounts.unmount_below(path)


def _end_processes(root: str) -> int:
    """Kill what still serves; how many processes there were."""
    found = 0
    for _, process in serving_processes(root):
        found += 1
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    return found


def _remove(root: str) -> None:
    paths = Root(root)
    mounts.unmount_below(root)
    # Of a command that was killed while it tried what the kernel can.
    for path in glob.glob(os.path.join(glob.escape(paths.cache.path), "new-*")):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(paths.snapshots):
            path = os.path.join(paths.snapshots, name)
            mounts.unmount_below(path)
            directory_tree.remove(path)
    for path in (paths.shards, paths.slots, paths.merged, paths.empty):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Internal(f"cannot remove {path}: {error.strerror}") from error
