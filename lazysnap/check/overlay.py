# SPDX-License-Identifier: Apache-2.0
"""What the kernel's overlay and EROFS can do, really tried on the root's file system."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import trio

from lazysnap import mounts
from lazysnap.check.finding import Context, Finding, Probe, failure, info, unknown, warning
from lazysnap.check.state import scratch


async def tried(context: Context, name: str) -> str:
    """The outcome of a trial, see `trial`: `yes`, `no`, or why that cannot be told."""
    with scratch(context) as directory:
        done = await trio.run_process(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *(sys.executable, "-P", "-m", "lazysnap.check.trial", name, directory),
            ],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with {done.returncode}"


async def works(context: Context) -> list[Finding]:
    """Copying up and whiteouts."""
    outcome = await tried(context, "overlay")
    if outcome == "yes":
        return []
    said = "files or whiteouts come out wrong" if outcome == "no" else outcome
    return [
        failure(
            f"overlay does not work on the root's file system: {said}",
            "no container can be started from any image",
            "run as root; put the root on ext4, or XFS with ftype=1, and not on overlay or NFS",
        )
    ]


async def opaque(context: Context) -> list[Finding]:
    """The bug of old kernels that containerd's and docker's own checks look for, too."""
    outcome = await tried(context, "opaque-spreads")
    if outcome == "no":
        return []
    if outcome != "yes":
        return [unknown(outcome)]
    return [
        warning(
            "this kernel copies the mark of opaque directories up into containers",
            "an image that is committed from a container loses files of the layers below",
            "use a newer kernel",
        )
    ]


async def data_only(context: Context) -> list[Finding]:
    """Data-only lower layers came with Linux 6.5."""
    return _wanted(
        await tried(context, "data-only"),
        "overlay cannot take a file's data from a data-only layer (Linux 6.5)",
    )


async def erofs(context: Context) -> list[Finding]:
    """File-backed mounts came with Linux 6.12 (CONFIG_EROFS_FS_BACKED_BY_FILE)."""
    return _wanted(
        await tried(context, "erofs-file"),
        "EROFS images cannot be mounted from files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE)",
    )


async def kernel_trees(context: Context) -> list[Finding]:
    """All that serving trees by the kernel takes, at once; 6.8 for overlay's mount interface."""
    return _wanted(
        await tried(context, "kernel-trees"),
        "the kernel cannot serve the trees of lazy layers (Linux 6.12)",
    )


def _wanted(outcome: str, summary: str) -> list[Finding]:
    if outcome == "yes":
        return []
    if outcome != "no":
        return [unknown(outcome)]
    why = "trees of lazy layers are served by FUSE, which is slower"
    return [info(summary, why, "use a newer kernel for faster lookups")]


def options(context: Context) -> Iterator[Finding]:
    """Defaults that lazysnap must overrule, or cannot."""
    if mounts.overlay_facts().user_namespace:
        yield warning(
            "running in a user namespace",
            "overlay needs `userxattr` there (Linux 5.11), and devices of images cannot be made",
            "run lazysnap and containerd in the first user namespace, unless that is on purpose",
        )
    if _parameter(context, "index") == "Y":
        yield info(
            "overlay's `index` is on by default",
            "lazysnap mounts with index=off, so it does no harm; other snapshotters may differ",
        )


def _parameter(context: Context, name: str) -> str:
    try:
        with open(context.host(f"sys/module/overlay/parameters/{name}"), encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


PROBES = (
    Probe("overlay", "overlay works", works),
    Probe("overlay-opaque", "opaque directories stay where they are", opaque),
    Probe("overlay-data-only", "overlay has data-only layers", data_only),
    Probe("erofs-file", "EROFS images can be mounted from files", erofs),
    Probe("kernel-trees", "the kernel can serve the trees of lazy layers", kernel_trees),
    Probe("overlay-options", "overlay's defaults fit", options),
)
