# SPDX-License-Identifier: Apache-2.0
"""The directories of snapshots below the root.

They are `snapshots/<id>/fs` and, for active snapshots, `snapshots/<id>/work`. A directory is built as
`new-<random>` and gets its number by a rename, so a directory with a number is complete. A directory that
the database does not know is garbage. All functions block. Knows nothing of the database.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Collection

from lazysnap import mounts
from lazysnap.errors import ConfigError, Internal
from lazysnap.overlay import fs_path
from lazysnap.paths import Root
from lazysnap.snapshotter import directory_tree

_NEW = "new-"
_DISCARDED = "rm-"
# Only these may be deleted here: an administrator may have put something beside them.
_OURS = re.compile(r"[1-9][0-9]*|new-.*|rm-.*", re.ASCII | re.DOTALL)


class Directories:
    """The directories of one root.

    Args:
        root: an absolute path; made if missing.

    Raises:
        ConfigError: the root cannot be used for overlay mounts.
        Internal: the root cannot be made or examined.
    """

    def __init__(self, root: str) -> None:
        if not os.path.isabs(root):
            raise ConfigError(f"the root {root!r} is not an absolute path")
        if any(c in root for c in ":,\\\n"):
            raise ConfigError(
                f"the root {root!r} has a character that overlay mount options cannot carry",
                hint="use a path without colon, comma, backslash and line feed",
            )
        try:
            for path in (root, Root(root).snapshots):
                os.makedirs(path, mode=0o700, exist_ok=True)
                # Images hold setuid files; no other user may reach them, whatever the umask is.
                os.chmod(path, 0o700)
            # Mounts are reported by the kernel under their real names.
            self.snapshots = Root(os.path.realpath(root)).snapshots
        except OSError as error:
            raise Internal(f"cannot make {error.filename}: {error.strerror}") from error
        if not mounts.supports_d_type(self.snapshots):
            raise ConfigError(
                f"the file system of {root} does not tell the type of directory entries,"
                " which overlay needs",
                hint="on XFS, make the file system with ftype=1",
            )

    def fs(self, snapshot_id: int) -> str:
        """The directory with a snapshot's own files, or its mount point if it is lazy."""
        return fs_path(self.snapshots, snapshot_id)

    def new_name(self) -> str:
        """A name for a directory to be built; no two are the same."""
        return _NEW + secrets.token_hex(8)

    def build(self, name: str, *, work: bool, parent_id: int | None) -> str:
        """Make the directory of a snapshot under a temporary name.

        Args:
            name: from `new_name`.
            work: whether overlay will write to it.
            parent_id: the snapshot below; the new `fs` gets the owner of its `fs`, as overlay shows
                the uppermost owner of "/".

        Returns:
            The path of its `fs`.

        Raises:
            Internal: the disk is full or the like; what was made is left to be collected.
        """
        top = os.path.join(self.snapshots, name)
        fs = f"{top}/fs"
        try:
            _mkdir(top, 0o700)
            _mkdir(fs, 0o755)
            if work:
                _mkdir(f"{top}/work", 0o711)
            if parent_id is not None:
                status = os.lstat(self.fs(parent_id))
                os.chown(fs, status.st_uid, status.st_gid, follow_symlinks=False)
        except OSError as error:
            raise Internal(
                f"cannot make the directories of a snapshot at {error.filename}: {error.strerror}",
                reason="no-space" if error.errno == errno.ENOSPC else None,
            ) from error
        return fs

    def place(self, name: str, snapshot_id: int) -> None:
        """Give a built directory its number, for good.

        Args:
            name: what it was built as.
            snapshot_id: a number that no snapshot has. A directory with this number, left by a
                transaction that failed after its rename, is put aside.

        Raises:
            Internal: the rename failed.
        """
        source = os.path.join(self.snapshots, name)
        target = os.path.join(self.snapshots, str(snapshot_id))
        try:
            try:
                os.rename(source, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self.discard(str(snapshot_id))
                os.rename(source, target)
            # The rename must not get lost in a power cut that the database survives.
            fd = os.open(self.snapshots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise Internal(f"cannot move {source} to {target}: {error.strerror}") from error

    def discard(self, name: str) -> str:
        """Take its number from a directory that belongs to no snapshot.

        Returns:
            Its new name.

        Raises:
            Internal: the rename failed.
        """
        aside = f"{_DISCARDED}{name}-{secrets.token_hex(8)}"
        try:
            os.rename(os.path.join(self.snapshots, name), os.path.join(self.snapshots, aside))
        except OSError as error:
            raise Internal(f"cannot rename {error.filename}: {error.strerror}") from error
        return aside

    def names(self) -> list[str]:
        """The names of all directories that belong, or belonged, to snapshots.

        Raises:
            Internal: they cannot be listed.
        """
        try:
            return [name for name in os.listdir(self.snapshots) if _OURS.fullmatch(name)]
        except OSError as error:
            raise Internal(f"cannot list {self.snapshots}: {error.strerror}") from error

    def dispose(self, name: str, check: Callable[[], object] = lambda: None) -> None:
        """Unmount what is left in a directory and delete it.

        Args:
            name: as in `names`.
            check: called now and then; may raise to stop.

        Raises:
            Internal: something could not be unmounted or deleted; nothing below a mount is touched.
        """
        path = os.path.join(self.snapshots, name)
        mounts.unmount_below(path)
        directory_tree.remove(path, check)


def garbage(names: Collection[str], ids: Collection[int]) -> list[str]:
    """The directories that belong to no snapshot.

    Args:
        names: all directories.
        ids: the numbers of all snapshots.
    """
    known = {str(number) for number in ids}
    return [name for name in names if name not in known]


def _mkdir(path: str, mode: int) -> None:
    os.mkdir(path, mode)
    os.chmod(path, mode)  # whatever the umask
