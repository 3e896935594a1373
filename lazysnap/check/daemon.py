# SPDX-License-Identifier: Apache-2.0
"""The daemon: whether it serves, which release it is, and where its mounts are seen."""

from __future__ import annotations

import contextlib
import os

import lazysnap
from lazysnap.check.finding import Context, Finding, Probe, failure, warning
from lazysnap.check.state import peer, running_daemon
from lazysnap.containerd.connection import Connection
from lazysnap.containerd.snapshots import Snapshots
from lazysnap.errors import ContainerdError, LazysnapError, NotFound

_START = "start it (systemctl start lazysnap), and see its log"


async def serving(context: Context) -> list[Finding]:
    """Asks it for a snapshot that there is not: a hung daemon accepts connections, too."""
    daemon = running_daemon(context)
    connection = Connection(context.address, "default")
    try:
        await connection.open()
        await Snapshots(connection, "").stat("lazysnap check: is anybody there?")
    except NotFound:
        pass
    except ContainerdError as error:
        if daemon is not None and daemon.address != context.address:
            return [
                failure(
                    f"lazysnap serve listens at {daemon.address}, not at {context.address}",
                    "containerd must connect to the same socket",
                    "name its socket with --address",
                )
            ]
        text = error.message.replace("containerd", "lazysnap serve")
        return [failure(text, "nothing can be pulled or started with it", _START)]
    except LazysnapError as error:
        return [
            failure(
                f"lazysnap serve does not answer as it should: {error}",
                "nothing can be pulled or started with it",
                "restart it, and see its log",
            )
        ]
    finally:
        connection.close()
    return _release(context)


def _release(context: Context) -> list[Finding]:
    daemon = running_daemon(context)
    if daemon is None:
        return [
            warning(
                f"the daemon at {context.address} does not serve {context.root}",
                "other findings are about another directory; or an older release serves this one",
                "name the daemon's directory with --root, or restart lazysnap serve",
            )
        ]
    if daemon.version != lazysnap.__version__:
        return [
            warning(
                f"lazysnap serve is release {daemon.version}, installed is {lazysnap.__version__}",
                "what the new release fixes is still broken",
                "restart it; mounts and containers go on working",
            )
        ]
    return []


def namespace(context: Context) -> list[Finding]:
    """Mounts must be seen by containerd, and by us."""
    daemon = running_daemon(context)
    if daemon is None:
        return []
    its = _mount_namespace(daemon.pid)
    found = []
    with contextlib.suppress(OSError):
        if _mount_namespace(peer(context.containerd)) != its:
            found.append(
                failure(
                    "lazysnap serve and containerd are in different mount namespaces",
                    "containerd does not see lazy layers: containers start with empty directories",
                    "remove PrivateTmp=, ProtectSystem= and the like from the unit of lazysnap",
                )
            )
    if _mount_namespace(os.getpid()) != its:
        found.append(
            warning(
                "lazysnap check runs in another mount namespace than lazysnap serve",
                "its findings about mounts are wrong",
                f"run `nsenter --mount --target {daemon.pid} lazysnap check`",
            )
        )
    return found


def _mount_namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")


PROBES = (
    Probe("daemon", "lazysnap serve answers", serving),
    Probe("mount-namespace", "mounts are seen by containerd", namespace),
)
