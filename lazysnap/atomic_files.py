# SPDX-License-Identifier: Apache-2.0
"""Files that change as a whole: they have all that they had, or all that is new.

New content is written beside the file, as `<path>.new-<pid>-<thread>`, and renamed. `lazysnap check`
finds what is left of it when a process is killed. All functions block. `layers.builder`,
`layers.blob_tail` and `layers.tree_image_file` do the same in their own way, as builders must start fast.
"""

from __future__ import annotations

import contextlib
import os
import threading


def replace(path: str, data: bytes, *, sync: bool = True) -> None:
    """Write a file so that, whatever happens, it has either all that it had or all that is new.

    Args:
        path: of the file.
        data: all that it is to have.
        sync: also after a power cut. Without it, the file may be empty then.

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    aside = _aside(path)
    try:
        with open(aside, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def replace_link(path: str, target: str) -> None:
    """Make a symbolic link, or have it lead elsewhere; there is always one or the other.

    Args:
        path: of the link.
        target: where it is to lead.

    Raises:
        OSError: the disk refuses; the link is as it was.
    """
    aside = _aside(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)  # of an earlier process with the same number
    os.symlink(target, aside)
    try:
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def _aside(path: str) -> str:
    # Several processes, and threads of one, may write the same file at the same time.
    return f"{path}.new-{os.getpid()}-{threading.get_ident()}"
