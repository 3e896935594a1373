# SPDX-License-Identifier: Apache-2.0
"""Applies a layer to a directory: straight into it, never through a mount.

Makes of a tar what containerd's applier does (archive/tar.go), with these differences: times of
directories that a layer leaves out are those of the layer below, as in a lazily mounted layer; a
whiteout never hides what its own layer has (image-spec layer.md), in whatever order they come; a hard
link does not take away the capabilities of its file. Blocks; `lazysnap.unpack.applier_pool` is how the
daemon uses it.

Invariant: whoever gets an error finds the target empty.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lazysnap.digest import Digest
from lazysnap.errors import FormatError, Internal, InvalidArgument, LazysnapError
from lazysnap.unpack.attributes import Attributes, refused_xattrs
from lazysnap.unpack.entries import Entries
from lazysnap.unpack.root import OPEN_DIRECTORY, Root, empty
from lazysnap.unpack.stream import Source, TarStream
from lazysnap.unpack.tree import Tree, find_below

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_IMPOSSIBLE = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EMLINK,
    errno.EFBIG,
)
"""Errors where a tar asks for something that no file system grants."""


class Whiteouts(enum.StrEnum):
    """The form that whiteouts get on disk."""

    TRUSTED = "trusted"
    """Character devices 0:0 and `trusted.overlay.opaque`: the target is an upper directory."""
    USER = "user"
    """The same with `user.overlay.opaque`, for overlay mounts with `userxattr`."""
    REMOVE = "remove"
    """The files are deleted: the target is a tree to which several layers are applied."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a layer is applied.

    Attributes:
        whiteouts: what becomes of them.
        lowers: directories of the layers below, nearest first. Directories that the layer leaves
            out get owner, mode, times and xattrs from there.
        same_owner: give files to the owner that the tar says; None if running as root.
        devices: make devices; False to leave them out, as is usual in a user namespace.
        root_entry: apply the attributes of `./` to the target. containerd ignores them.
        alone: the layers below are not there yet: `inherit` is to be called when they are. Such a layer
            can be refused with the reason `needs-lower`, and not with `lowers` at hand.
        most_bytes: of the tar, and of all files with their holes; None for no limit.
        most_entries: files and directories; None for no limit.
    """

    whiteouts: Whiteouts = Whiteouts.TRUSTED
    lowers: Sequence[str] = ()
    same_owner: bool | None = None
    devices: bool = True
    root_entry: bool = False
    alone: bool = False
    most_bytes: int | None = None
    most_entries: int | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of applying a layer.

    Attributes:
        diff_id: of the tar.
        size: of the tar in bytes.
        entries: files and directories in it.
        ignored_xattrs: how many xattrs were not set.
        examples: names of some of them.
        left_out: with `Options.alone`, what to hand to `inherit`.
    """

    diff_id: Digest
    size: int
    entries: int
    ignored_xattrs: int = 0
    examples: tuple[str, ...] = ()
    left_out: tuple[bytes, ...] = ()


def apply(
    source: Source,
    target: str,
    options: Options | None = None,
    *,
    digest: Digest | None = None,
    diff_id: Digest | None = None,
    check: Callable[[], object] = lambda: None,
) -> Applied:
    """Apply a layer: gzip, zstd or no compression.

    Args:
        source: of the blob. On an error it may not have been read to its end.
        target: a directory. Must be empty, unless whiteouts remove files.
        options: how.
        digest: of the blob; None not to check.
        diff_id: of the tar; None not to check.
        check: called for each entry and each piece of a file; may raise to stop.

    Raises:
        FormatError: the layer is malformed, or breaks a limit (reason `too-big`).
        DigestMismatch: it is another layer.
        InvalidArgument: the target cannot be used; nothing is deleted then.
        Internal: the disk is full (reason `no-space`), or the system refused something else.
    """
    options = options or Options()
    what = f"layer {digest or diff_id or 'of unknown digest'}"
    with contextlib.ExitStack() as stack:
        top = _open_target(target, options)
        stack.callback(os.close, top)
        lowers = [Root(_open(lower)) for lower in options.lowers]
        stream = stack.enter_context(
            TarStream(source, digest=digest, diff_id=diff_id, limit=options.most_bytes)
        )
        entries = Entries(stream)
        tree = Tree(os.dup(top), stream, _form(options), lowers, check)
        try:
            return _run(stream, entries, tree, options, check)
        except BaseException as error:
            _empty(top)
            if isinstance(error, (LazysnapError, OSError)):
                raise _named(error, what, entries.where) from error
            raise


def inherit(
    target: str, lowers: Sequence[str], left_out: Sequence[bytes], whiteouts: Whiteouts
) -> None:
    """Finish a layer that was applied alone, once the layers below it are there.

    Args:
        target: with the layer.
        lowers: directories of the layers below, nearest first.
        left_out: as it was told.
        whiteouts: as the layer was applied.

    Raises:
        Internal: the system refused something.
    """
    if not left_out:
        return
    roots = [Root(_open(lower)) for lower in lowers]
    form = _form(Options(whiteouts=whiteouts))
    attributes = Attributes(same_owner=form.same_owner, refused=refused_xattrs(form.opaque))
    try:
        made = Root(os.open(target, OPEN_DIRECTORY))
        for path in left_out:
            lower = find_below(path, roots)
            if lower is not None:
                fd = made.directory(path).fd
                mode, times = attributes.inherit(fd, lower.fd)
                os.chmod(fd, mode)
                os.utime(fd, ns=times)
    except OSError as error:
        raise Internal(f"{target} cannot be finished: {error.strerror or error}") from error


def _run(
    stream: TarStream,
    entries: Entries,
    tree: Tree,
    options: Options,
    check: Callable[[], object],
) -> Applied:
    number = size = 0
    while (entry := entries.next()) is not None:
        check()
        number += 1
        size += entry.size
        if options.most_entries is not None and number > options.most_entries:
            raise FormatError(f"more than {options.most_entries} entries", reason="too-big")
        if options.most_bytes is not None and size > options.most_bytes:
            raise FormatError(
                f"files of more than {options.most_bytes} bytes together", reason="too-big"
            )
        tree.add(entry)
    diff_id, length = stream.finish()
    tree.finish()
    attributes = tree.attributes
    return Applied(
        diff_id=diff_id,
        size=length,
        entries=number,
        ignored_xattrs=attributes.ignored,
        examples=tuple(attributes.examples),
        left_out=tuple(sorted(tree.left_out)),
    )


def opaque_mark(whiteouts: Whiteouts) -> bytes:
    """The xattr that marks opaque directories; empty if files are removed instead."""
    return {
        Whiteouts.TRUSTED: b"trusted.overlay.opaque",
        Whiteouts.USER: b"user.overlay.opaque",
        Whiteouts.REMOVE: b"",
    }[whiteouts]


def _form(options: Options) -> Tree.Form:
    same_owner = os.geteuid() == 0 if options.same_owner is None else options.same_owner
    opaque = opaque_mark(options.whiteouts)
    return Tree.Form(opaque, same_owner, options.devices, options.root_entry, options.alone)


def _open_target(target: str, options: Options) -> int:
    try:
        fd = os.open(target, OPEN_DIRECTORY)
        if options.whiteouts is not Whiteouts.REMOVE:
            with os.scandir(fd) as listing:
                if next(listing, None) is not None:
                    os.close(fd)
                    raise InvalidArgument(f"{target} is not empty")
    except OSError as error:
        raise InvalidArgument(f"cannot unpack into {target}: {error.strerror}") from error
    return fd


def _open(lower: str) -> int:
    try:
        return os.open(lower, OPEN_DIRECTORY)
    except OSError as error:
        raise Internal(f"the layer below at {lower} cannot be read: {error.strerror}") from error


def _empty(top: int) -> None:
    """Leave nothing in the target. An entry that cannot be deleted must not hide the first error."""
    with contextlib.suppress(OSError):
        empty(top)
    for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
        with contextlib.suppress(OSError):
            os.removexattr(top, name)


def _named(error: LazysnapError | OSError, what: str, place: str) -> LazysnapError:
    """The error, with layer and entry."""
    where = f"{what}, {place}" if place else what
    if isinstance(error, LazysnapError):
        text = f"{where}: {error.message}"
        kind = FormatError if isinstance(error, FormatError) else type(error)
        return kind(text, hint=error.hint, reason=error.reason)
    text = f"{where}: {error.strerror or error}"
    if error.errno in _NO_SPACE:
        return Internal(text, hint="free some space, or some inodes", reason="no-space")
    return FormatError(text) if error.errno in _IMPOSSIBLE else Internal(text)
