# SPDX-License-Identifier: Apache-2.0
"""What lazysnap needs of the kernel and of FUSE."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator

from lazysnap.check.finding import Context, Finding, Probe, failure, info, warning

_RESEND = (6, 9)
_PAGES = 256


def user(context: Context) -> Iterator[Finding]:
    """Everything needs root: mounting, and reading what belongs to root."""
    if os.geteuid() != 0:
        yield warning(
            "not running as root",
            "many of the checks need root",
            "run `lazysnap check` as root",
        )


def fuse_device(context: Context) -> Iterator[Finding]:
    """Opens /dev/fuse, which also shows what a container's device rules forbid."""
    path = context.host("dev/fuse")
    why = "no layer can be mounted lazily"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield failure(
            f"there is no {path}",
            why,
            "run `modprobe fuse`; start a container with --device /dev/fuse",
        )
        return
    except OSError as error:
        hint = "run `modprobe fuse`; start a container with --device /dev/fuse"
        yield failure(f"{path} cannot be opened: {error.strerror}", why, hint)
        return
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            yield failure(f"{path} is not a device", why, f"run `mknod {path} c 10 229`")
    finally:
        os.close(fd)


def release(context: Context) -> Iterator[Finding]:
    """FUSE_NOTIFY_RESEND came with Linux 6.9, as did passthrough (include/uapi/linux/fuse.h)."""
    numbers = re.match(r"(\d+)\.(\d+)", context.release)
    if numbers is None:
        yield info(f"the kernel's release {context.release!r} is not understood")
    elif (int(numbers[1]), int(numbers[2])) < _RESEND:
        yield warning(
            f"Linux {context.release} is older than 6.9",
            "when a worker is replaced, reads that it had begun hang (no FUSE_NOTIFY_RESEND), and all"
            " reads of cached files go through it (no passthrough)",
            "use a newer kernel",
        )


def fuse_limits(context: Context) -> Iterator[Finding]:
    """The largest request: 256 pages are 1 MiB. Since Linux 6.13 it can be set."""
    path = context.host("proc/sys/fs/fuse/max_pages_limit")
    try:
        with open(path, encoding="ascii") as file:
            pages = int(file.read())
    except FileNotFoundError:
        return
    if pages < _PAGES:
        yield warning(
            f"FUSE requests are limited to {pages} pages",
            "large files are read in many small requests, which is slow",
            f"run `sysctl fs.fuse.max_pages_limit={_PAGES}`",
        )


PROBES = (
    Probe("user", "running as root", user),
    Probe("fuse-device", "FUSE can be used", fuse_device),
    Probe("kernel-release", "the kernel has what workers need", release),
    Probe("fuse-limits", "FUSE requests may be large", fuse_limits),
)
