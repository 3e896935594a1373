# SPDX-License-Identifier: Apache-2.0
"""Makes the files of a layer, entry by entry. The rules are those of `lazysnap.unpack.applier`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lazysnap.errors import FormatError
from lazysnap.formats import tar
from lazysnap.unpack.attributes import Attributes, refused_xattrs
from lazysnap.unpack.entries import Entry
from lazysnap.unpack.root import OPEN_DIRECTORY, Directory, NotADirectoryThere, Root, remove
from lazysnap.unpack.stream import TarStream

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL = {
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FIFO: stat.S_IFIFO,
}
_UNTIL_FINISHED = 0o700
"""Mode of directories while files are made in them."""
_MOST_LEFT_OUT = 4096
NEEDS_LOWER = "needs-lower"
"""Reason of the error when a layer can only be unpacked when those below are there."""


@dataclass(slots=True)
class _Late:
    """The attributes that a directory gets when nothing is made in it any more."""

    mode: int
    times: tuple[int, int] | None


class Tree:
    """The tree that a layer makes.

    Args:
        top: the directory, open; taken over.
        stream: stands at an entry's data when that is added.
        form: how things are done.
        lowers: trees of the layers below, nearest first.
        check: called for each piece of a file.

    Attributes:
        attributes: what sets them.
        left_out: with `Form.alone`, paths of directories that the layer leaves out.
    """

    @dataclass(frozen=True, slots=True)
    class Form:
        """How things are done.

        Attributes:
            opaque: xattr that marks opaque directories; empty if whiteouts remove files.
            same_owner: set owners.
            devices: make devices.
            root_entry: apply the attributes of the tar's root to the top.
            alone: nothing of the layers below can be looked at yet.
        """

        opaque: bytes
        same_owner: bool
        devices: bool
        root_entry: bool
        alone: bool

    def __init__(
        self,
        top: int,
        stream: TarStream,
        form: Form,
        lowers: Sequence[Root],
        check: Callable[[], object],
    ) -> None:
        self.attributes = Attributes(
            same_owner=form.same_owner, refused=refused_xattrs(form.opaque)
        )
        self._root = Root(top, self._make_left_out, self._replace_whiteout, self._note_times)
        self._stream = stream
        self._form = form
        self._lowers = lowers
        self._check = check
        self._late: dict[bytes, _Late] = {}
        # paths of this layer, which whiteouts that remove files must spare
        self._own: set[bytes] = set()
        self.left_out: set[bytes] = set()
        self._note_times(self._root.top)

    def add(self, entry: Entry) -> None:
        """Make a file.

        Raises:
            FormatError: it cannot be.
            OSError: the kernel refused.
        """
        path = _clean(entry.name)
        parent, _, name = path.rpartition(b"/")
        if not name:
            if self._form.root_entry and entry.kind == tar.DIRECTORY:
                self._finish_directory(self._root.top, entry)
            return
        if path.startswith(_WHITEOUT) or b"/" + _WHITEOUT in path:
            if parent.startswith(_WHITEOUT) or b"/" + _WHITEOUT in parent:
                raise FormatError("a directory has the name of a whiteout")
            self._whiteout(parent, name, entry)
            return
        directory = self._root.directory(parent)
        if not self._form.opaque:
            self._note_own(directory.child(name))
        if entry.kind == tar.FILE:
            self._file(directory, name, entry)
        elif entry.kind == tar.DIRECTORY:
            self._directory(directory, name, entry)
        elif entry.kind == tar.SYMLINK:
            self._anew(directory, name, lambda: os.symlink(entry.link, name, dir_fd=directory.fd))
            self.attributes.of_symlink(directory, name, entry)
        elif entry.kind == tar.HARD_LINK:
            self._link(directory, name, entry)
        elif self._form.devices or entry.kind == tar.FIFO:
            self._special(directory, name, entry)

    def finish(self) -> None:
        """Give directories their modes and times, inner ones first."""
        # From now on nothing is made, and nothing is followed to something new.
        root = Root(os.dup(self._root.top.fd))
        for path in sorted(self._late, reverse=True):
            late = self._late[path]
            try:
                found = root.directory(path)
            except (FileNotFoundError, NotADirectoryThere):
                continue  # a later entry took its place
            if found.path == path:
                os.chmod(found.fd, late.mode)
                if late.times is not None:
                    os.utime(found.fd, ns=late.times)

    # -- kinds of files -----------------------------------------------------------------------------

    def _anew(self, directory: Directory, name: bytes, make: Callable[[], None]) -> None:
        """Make something, after whatever is there has been removed."""
        try:
            make()
        except FileExistsError:
            self._clear(directory, name)
            make()

    def _file(self, directory: Directory, name: bytes, entry: Entry) -> None:
        try:
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=directory.fd)
        except FileExistsError:
            self._clear(directory, name)
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=directory.fd)
        try:
            if entry.pieces is not None:
                self._write_pieces(fd, entry)
            elif entry.size:
                self._write(fd, entry.size)
            self.attributes.of_file(fd, entry)
        finally:
            os.close(fd)

    def _write(self, fd: int, size: int) -> None:
        for data in self._stream.pieces(size):
            written = os.write(fd, data)
            while written < len(data):
                written += os.write(fd, data[written:])
            self._check()

    def _write_pieces(self, fd: int, entry: Entry) -> None:
        os.ftruncate(fd, entry.size)
        for offset, length in entry.pieces or ():
            os.lseek(fd, offset, os.SEEK_SET)
            self._write(fd, length)

    def _directory(self, directory: Directory, name: bytes, entry: Entry) -> None:
        if directory.child(name) in self.left_out:
            raise FormatError("a directory behind what is in it", reason=NEEDS_LOWER)
        try:
            os.mkdir(name, _UNTIL_FINISHED, dir_fd=directory.fd)
        except FileExistsError:
            found = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                self._clear(directory, name)
                os.mkdir(name, _UNTIL_FINISHED, dir_fd=directory.fd)
        self._finish_directory(self._opened(directory, name), entry)

    def _opened(self, directory: Directory, name: bytes) -> Directory:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory.fd)
        opened = Directory(fd, directory.child(name))
        self._root.keep(opened)
        return opened

    def _finish_directory(self, directory: Directory, entry: Entry) -> None:
        self.attributes.of_directory(directory.fd, entry.uid, entry.gid, entry.xattrs)
        self._late[directory.path] = _Late(entry.mode, (entry.atime_ns, entry.mtime_ns))

    def _link(self, directory: Directory, name: bytes, entry: Entry) -> None:
        target = _clean(entry.link)
        parent, _, base = target.rpartition(b"/")
        place = self._root.directory(parent) if base else self._root.top
        status = os.stat(base or b".", dir_fd=place.fd, follow_symlinks=False)
        if directory.child(name) == place.child(base):
            raise FormatError("a hard link to itself")

        def link() -> None:
            os.link(base, name, src_dir_fd=place.fd, dst_dir_fd=directory.fd, follow_symlinks=False)

        if stat.S_ISDIR(status.st_mode):
            raise FormatError("a hard link to a directory")
        self._anew(directory, name, link)
        self.attributes.of_link(directory, name, entry, status)

    def _special(self, directory: Directory, name: bytes, entry: Entry) -> None:
        kind = _SPECIAL[entry.kind]
        rdev = 0 if entry.kind == tar.FIFO else os.makedev(*entry.device)

        def make() -> None:
            os.mknod(name, kind | 0o600, rdev, dir_fd=directory.fd)

        self._anew(directory, name, make)
        self.attributes.of_special(directory, name, entry, rdev)

    def _clear(self, directory: Directory, name: bytes) -> None:
        """Remove whatever has a name."""
        try:
            found = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            if self.left_out:
                raise FormatError("a directory is replaced", reason=NEEDS_LOWER)
            remove(directory.fd, name)
        else:
            os.unlink(name, dir_fd=directory.fd)
        if not stat.S_ISREG(found.st_mode):
            self._root.forget()

    # -- directories that the layer leaves out ------------------------------------------------------

    def _make_left_out(self, directory: Directory, name: bytes) -> Directory:
        os.mkdir(name, _UNTIL_FINISHED, dir_fd=directory.fd)
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=directory.fd)
        made = Directory(fd, directory.child(name))
        self._late[made.path] = _Late(0o755, None)
        if self._form.alone:
            self.left_out.add(made.path)
            if len(self.left_out) > _MOST_LEFT_OUT:
                raise FormatError("too many directories are left out", reason=NEEDS_LOWER)
        lower = find_below(made.path, self._lowers)
        if lower is not None:
            self._late[made.path] = _Late(*self.attributes.inherit(made.fd, lower.fd))
        return made

    def _note_times(self, directory: Directory) -> None:
        """Note the times of a directory of a lower layer that gets new files, so that they stay."""
        if not self._form.opaque and directory.path not in self._late:
            status = os.fstat(directory.fd)
            times = status.st_atime_ns, status.st_mtime_ns
            self._late[directory.path] = _Late(stat.S_IMODE(status.st_mode), times)

    def _replace_whiteout(self, directory: Directory, name: bytes) -> bool:
        """Something of this layer is below a name that the layer deletes: the name is there."""
        if not self._form.opaque:
            return False
        found = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != 0:
            return False
        os.unlink(name, dir_fd=directory.fd)
        return True

    # -- whiteouts ----------------------------------------------------------------------------------

    def _whiteout(self, parent: bytes, name: bytes, entry: Entry) -> None:
        hidden = b"" if name == _OPAQUE else name[len(_WHITEOUT) :]
        if name != _OPAQUE and hidden in (b"", b".", b".."):
            raise FormatError("a whiteout of nothing")
        directory = self._root.directory(parent)
        if not self._form.opaque:
            path = self._remove_below(directory, hidden) if hidden else directory.path
            if path is not None:
                self._remove_lower(path)
            return
        if not hidden:
            os.setxattr(directory.fd, self._form.opaque, b"y")
            return
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=directory.fd)
        except FileExistsError:
            return  # this layer has something of that name, which it does not hide
        if self.attributes.same_owner:
            owner = self.attributes.owner(entry.uid, entry.gid)
            os.chown(hidden, *owner, dir_fd=directory.fd, follow_symlinks=False)

    def _note_own(self, path: bytes) -> None:
        while path and path not in self._own:
            self._own.add(path)
            path = path.rpartition(b"/")[0]

    def _remove_lower(self, path: bytes) -> None:
        """Remove what is in a directory and not of this layer."""
        left = [path]
        while left:
            directory = self._root.directory(left.pop())
            for name in os.listdir(directory.fd):
                below = self._remove_below(directory, os.fsencode(name))
                if below is not None:
                    left.append(below)

    def _remove_below(self, directory: Directory, name: bytes) -> bytes | None:
        """Remove one name, unless this layer has it; returns its path if it is a directory."""
        path = directory.child(name)
        if path not in self._own:
            self._clear(directory, name)
            return None
        try:
            found = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        return path if stat.S_ISDIR(found.st_mode) else None


def find_below(path: bytes, lowers: Sequence[Root]) -> Directory | None:
    """The directory that a path is in the layers below.

    Args:
        path: of a directory of this layer.
        lowers: nearest first.
    """
    for lower in lowers:
        try:
            found = lower.find(path)
        except NotADirectoryThere:
            return None
        if found is not None:
            return found
    return None


def _clean(name: bytes) -> bytes:
    """A name with single slashes and nothing but names between them; `..` ends at the root."""
    if b"./" not in name and b"/." not in name and b"//" not in name and name[:1] not in b"./":
        return name[:-1] if name.endswith(b"/") else name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
