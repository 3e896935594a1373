# SPDX-License-Identifier: Apache-2.0
"""Tries what a kernel can do, with real mounts in a temporary directory.

`unshare --mount python -m lazysnap.check.trial NAME DIRECTORY` prints `yes` or `no`, or the
error that prevents an answer. It has a mount namespace of its own, so nothing stays mounted, however it
ends.
"""

from __future__ import annotations

import base64
import os
import stat
import sys
import zlib
from collections.abc import Callable, Sequence

from lazysnap import mounts
from lazysnap.errors import LazysnapError
from lazysnap.filesystem.kernel_trees import why_not

# An EROFS image of one file, `file`, with the text "lazysnap":
# mkfs.erofs -T0 -U 00000000-0000-0000-0000-000000000001 --all-root -x-1 IMAGE DIRECTORY (1.5)
_EROFS = (
    "eNpjYBgFo2AUjFTw6OHXB4pmk6yYgWweBhUGJixqGHFrZ6TUfhYgfuvIxKAN5f8HAmR5FTjNBGerAtnqULY60Al6enppmTmp"
    "OM1f0sjIwIlkPrKjcxKrKovzEgu4RpPCKBgFo2AUjIJRMApGwSgYAQAAv0QWCA=="
)
_CONTENT = b"lazysnap\n"
OPAQUE = "trusted.overlay.opaque"


def overlay(directory: str) -> bool:
    """Whether overlay works there: copying up, and whiteouts."""
    lower, upper, work, merged = _directories(directory, ("lower", "upper", "work", "merged"))
    for name in ("changed", "removed"):
        _write(f"{lower}/{name}", _CONTENT)
    mounts.mount(
        "overlay", merged, "overlay", data=f"lowerdir={lower},upperdir={upper},workdir={work}"
    )
    _write(f"{merged}/changed", b"new")
    os.unlink(f"{merged}/removed")
    whiteout = os.lstat(f"{upper}/removed")
    return (
        _read(f"{upper}/changed") == b"new"
        and _read(f"{lower}/changed") == _CONTENT
        and stat.S_ISCHR(whiteout.st_mode)
        and whiteout.st_rdev == 0
        and os.listdir(merged) == ["changed"]
    )


def opaque_spreads(directory: str, attribute: str = OPAQUE) -> bool:
    """Whether the mark of an opaque directory is copied up from a lower layer.

    Args:
        directory: an empty one.
        attribute: the mark.
    """
    bottom, lower, upper, work, merged = _directories(
        directory, ("bottom", "lower", "upper", "work", "merged")
    )
    os.mkdir(f"{bottom}/d")
    os.mkdir(f"{lower}/d")
    os.setxattr(f"{lower}/d", attribute, b"y")
    options = f"lowerdir={lower}:{bottom},upperdir={upper},workdir={work}"
    mounts.mount("overlay", merged, "overlay", data=options)
    _write(f"{merged}/d/file", b"")
    return attribute in os.listxattr(f"{upper}/d")


def data_only(directory: str) -> bool:
    """Whether a file's data can come from a data-only lower layer."""
    trees, data, merged = _directories(directory, ("trees", "data", "merged"))
    _write(f"{data}/content", _CONTENT)
    with open(f"{trees}/file", "wb") as file:
        file.truncate(len(_CONTENT))
    os.setxattr(f"{trees}/file", "trusted.overlay.metacopy", b"")
    os.setxattr(f"{trees}/file", "trusted.overlay.redirect", b"/content")
    try:
        options = f"metacopy=on,lowerdir={trees}::{data}"
        mounts.mount("overlay", merged, "overlay", mounts.MS_RDONLY, data=options)
        return _read(f"{merged}/file") == _CONTENT
    except (LazysnapError, OSError):  # before 6.5 it does not mount
        return False


def erofs_file(directory: str) -> bool:
    """Whether an EROFS image can be mounted from a file, without a loop device."""
    (merged,) = _directories(directory, ("merged",))
    _write(f"{directory}/image", zlib.decompress(base64.b64decode(_EROFS)))
    try:
        mounts.mount(f"{directory}/image", merged, "erofs", mounts.MS_RDONLY)
    except LazysnapError:
        return False
    return _read(f"{merged}/file") == _CONTENT


def kernel_trees(directory: str) -> bool:
    """Whether all of that works together, as it is used for lazy layers."""
    return not why_not(directory)


TRIALS: dict[str, Callable[[str], bool]] = {
    "overlay": overlay,
    "opaque-spreads": opaque_spreads,
    "data-only": data_only,
    "erofs-file": erofs_file,
    "kernel-trees": kernel_trees,
}


def _directories(directory: str, names: Sequence[str]) -> list[str]:
    paths = [f"{directory}/{name}" for name in names]
    for path in paths:
        os.mkdir(path)
    return paths


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def main() -> None:
    """Entry point of `python -m lazysnap.check.trial`."""
    name, directory = sys.argv[1:]
    try:
        print("yes" if TRIALS[name](directory) else "no")
    except (LazysnapError, OSError) as error:
        print(error)


if __name__ == "__main__":
    main()
