# SPDX-License-Identifier: Apache-2.0
"""Measuring and deleting directory trees that others have filled.

An image can hold trees that are deeper than any path may be long or than Python may recurse, and a
directory with millions of entries. So both go through directories with a stack of their own and
relative to open directories, and neither keeps the names of files. Symbolic links are never
followed. Blocks; `check` is called once per directory and may raise to stop.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from enum import Enum, auto

from lazysnap.errors import Internal
from lazysnap.store.records import Usage

# In characters, of up to four bytes; with one more name it stays below PATH_MAX (4096 bytes).
_MAX_RELATIVE = 700
_BLOCK = 512
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Others may add files to a directory while it is emptied, but not for ever.
_MAX_VISITS = 100


class _Step(Enum):
    ENTER = auto()
    LEAVE = auto()
    CLOSE = auto()


def measure(path: str, check: Callable[[], object] = lambda: None) -> Usage:
    """What a tree takes on disk, as du(1) counts: allocated blocks, each inode once.

    Args:
        path: the top directory, which is counted too.
        check: called for each directory.

    Raises:
        Internal: a directory cannot be read.
    """
    size = inodes = 0
    # only inodes with several names are remembered
    seen: set[tuple[int, int]] = set()

    def count(status: os.stat_result) -> None:
        nonlocal size, inodes
        size += status.st_blocks * _BLOCK
        inodes += 1

    def enter(fd: int) -> None:
        check()
        count(os.fstat(fd))

    def file(_fd: int, entry: os.DirEntry[str]) -> None:
        status = entry.stat(follow_symlinks=False)
        if status.st_nlink > 1:
            key = (status.st_dev, status.st_ino)
            if key in seen:
                return
            seen.add(key)
        count(status)

    try:
        _traverse(path, enter, file)
    except OSError as error:
        raise Internal(f"cannot measure {path}: {error.strerror}") from error
    return Usage(size, inodes)


def remove(path: str, check: Callable[[], object] = lambda: None) -> None:
    """Delete a tree; nothing happens if it does not exist.

    Args:
        path: the top directory.
        check: called for each directory.

    Raises:
        Internal: something cannot be deleted, or is on another file system than the top; what was
            deleted before stays deleted.
    """
    visits: dict[str, int] = {}
    try:
        device = os.lstat(path).st_dev

        def enter(fd: int) -> None:
            check()
            if os.fstat(fd).st_dev != device:
                raise Internal(f"will not delete {path}: something is mounted below it")

        def file(fd: int, entry: os.DirEntry[str]) -> None:
            os.unlink(entry.name, dir_fd=fd)

        def leave(fd: int | None, relative: str) -> bool:
            try:
                os.rmdir(relative, dir_fd=fd)
            except OSError as error:
                # deleting entries while listing a directory may hide others from the listing
                visits[relative] = visits.get(relative, 0) + 1
                if error.errno != errno.ENOTEMPTY or visits[relative] > _MAX_VISITS:
                    raise
                return False
            return True

        _traverse(path, enter, file, leave)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Internal(f"cannot delete {path}: {error.strerror}") from error


def _traverse(
    top: str,
    enter: Callable[[int], None],
    file: Callable[[int, os.DirEntry[str]], None],
    leave: Callable[[int | None, str], bool] | None = None,
) -> None:
    """Go through a tree, depth first.

    Args:
        top: the top directory.
        enter: called with each directory, open.
        file: called with each entry that is not a directory, and its directory.
        leave: called after everything below a directory, with an open directory and the path
            relative to it; when it returns False the directory is gone through again.
    """
    stack: list[tuple[_Step, int | None, str]] = [(_Step.ENTER, None, top)]
    try:
        while stack:
            step, base, relative = stack.pop()
            if step is _Step.CLOSE:
                assert base is not None
                os.close(base)
            elif step is _Step.LEAVE:
                assert leave is not None
                if not leave(base, relative):
                    stack.append((_Step.ENTER, base, relative))
            else:
                if leave is not None:
                    stack.append((_Step.LEAVE, base, relative))
                _enter(stack, base, relative, enter, file, removing=leave is not None)
    finally:
        for step, base, _ in stack:
            if step is _Step.CLOSE and base is not None:
                os.close(base)


def _enter(
    stack: list[tuple[_Step, int | None, str]],
    base: int | None,
    relative: str,
    enter: Callable[[int], None],
    file: Callable[[int, os.DirEntry[str]], None],
    *,
    removing: bool,
) -> None:
    """Go through the entries of one directory and put its subdirectories on the stack."""
    if removing and os.geteuid() != 0:
        _open_up(base, relative)
    fd = os.open(relative, _OPEN_DIRECTORY, dir_fd=base)
    keep = len(relative) > _MAX_RELATIVE
    try:
        enter(fd)
        subdirectories = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    subdirectories.append(entry.name)
                else:
                    file(fd, entry)
    except BaseException:
        os.close(fd)
        raise
    if keep:
        # below here, paths start anew; closed when the last of them has been popped
        stack.append((_Step.CLOSE, fd, ""))
        stack.extend((_Step.ENTER, fd, name) for name in subdirectories)
    else:
        os.close(fd)
        stack.extend((_Step.ENTER, base, f"{relative}/{name}") for name in subdirectories)


def _open_up(base: int | None, relative: str) -> None:
    """Give its owner access to a directory: some in images only root may read or write to."""
    fd = os.open(relative, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)
