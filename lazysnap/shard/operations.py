# SPDX-License-Identifier: Apache-2.0
"""Answers the FUSE requests of a shard, and turns errors into errnos.

An inode number is `slot << 32 | node + 1`, so that any worker can answer for what an earlier one told
the kernel (kept between releases, see `lazysnap.shard`); slot 0 is the root of the mount. A file handle
is the inode number. Nothing ever changes, so the kernel may keep entries (also of what does not exist),
attributes and pages for ever.

Invariant: no handler lets anything but FUSEError out, as that would end the process.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from lazysnap import log
from lazysnap.errors import LazysnapError, NotFound
from lazysnap.metrics import families
from lazysnap.metrics.counts import BOUNDS, counts
from lazysnap.shard import content_view
from lazysnap.shard.activity import activity
from lazysnap.shard.mounted_layers import MountedLayer, MountedLayers

_log = log.get(__name__)
FOR_EVER = 10 * 365 * 86400.0
"""Seconds for which the kernel may keep what it was told."""
_NODE_MASK = (1 << 32) - 1
_DOTS = 2
P = ParamSpec("P")
R = TypeVar("R")


def inode_of(slot: int, node: int) -> int:
    """The inode number of a node in the layer of a slot."""
    return slot << 32 | node + 1


Handler = Callable[P, Awaitable[R]]


def guarded(name: str) -> Callable[[Handler[P, R]], Handler[P, R]]:
    """Note how long requests take, and let nothing but FUSEError out of a handler.

    Args:
        name: of the request.
    """
    numbers = counts.histogram(families.FUSE_SECONDS, name)

    def guard(handler: Handler[P, R]) -> Handler[P, R]:
        @functools.wraps(handler)
        async def handle(*args: P.args, **kwargs: P.kwargs) -> R:
            activity.last = began = time.monotonic()
            try:
                return await handler(*args, **kwargs)
            except FUSEError:
                raise
            except LazysnapError as error:
                counts.add(families.FUSE_ERRORS, name)
                raise FUSEError(error.errno) from error
            except Exception as error:  # an edge: one bad request must not take the mount away
                counts.add(families.FUSE_ERRORS, name)
                _log.exception("request failed", request=name)
                raise FUSEError(errno.EIO) from error
            finally:
                seconds = time.monotonic() - began
                numbers[bisect_left(BOUNDS, seconds)] += 1
                numbers[-1] += seconds

        return handle

    return guard


class Operations:
    """Handlers for pyfuse3.

    Args:
        layers: what is mounted here.
        root: lazysnap's root directory, whose file system `statfs` reports.
        xattrs: whether any layer here has extended attributes.
    """

    NAMES: tuple[str, ...] = (
        "lookup", "getattr", "readlink", "opendir", "readdir", "releasedir", "open", "read",
        "release", "getxattr", "listxattr", "statfs", "forget", "access",
    )  # fmt: skip

    def __init__(self, layers: MountedLayers, root: str, *, xattrs: bool) -> None:
        self.layers = layers
        self.contents = content_view.ContentView(layers)
        self.xattrs = xattrs
        self.root = root
        # pyfuse3 copies from them while it answers, before the next handler can run.
        self._absent = EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = FOR_EVER

    def install(self, target: pyfuse3.Operations) -> None:
        """Put these handlers into the object that pyfuse3 calls."""
        for name in self.NAMES:
            setattr(target, name, getattr(self, name))

    async def _layer(self, inode: int) -> tuple[MountedLayer, int]:
        slot = inode >> 32
        layer = self.layers.get(slot)
        if layer is None:
            try:
                layer = await self.layers.load(slot)
            except NotFound as error:
                raise FUSEError(errno.ESTALE) from error
        return layer, (inode & _NODE_MASK) - 1

    @guarded("lookup")
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Look a name up in a directory."""
        if parent == pyfuse3.ROOT_INODE:
            if name == content_view.NAME:
                return directory_entry(content_view.ROOT)
            return await self._lookup_slot(name)
        if content_view.is_directory(parent):
            return await self._lookup_content(parent, name)
        layer, node = await self._layer(parent)
        child = layer.index.lookup(node, name)
        if child < 0:
            return self._absent
        return layer_entry(layer, child)

    async def _lookup_slot(self, name: bytes) -> EntryAttributes:
        # No cached "absent": the slot may be attached in the next moment.
        if not name.isdigit() or name.startswith(b"0"):
            raise FUSEError(errno.ENOENT)
        try:
            layer = await self.layers.load(int(name))
        except NotFound as error:
            raise FUSEError(errno.ENOENT) from error
        return layer_entry(layer, 0)

    async def _lookup_content(self, parent: int, name: bytes) -> EntryAttributes:
        found = await self.contents.lookup(parent, name)
        if found is None:
            if parent == content_view.ROOT:  # as for slots
                raise FUSEError(errno.ENOENT)
            return self._absent
        return directory_entry(found) if isinstance(found, int) else layer_entry(*found)

    @guarded("getattr")
    async def getattr(self, inode: int, ctx: RequestContext | None) -> EntryAttributes:
        """Attributes of an inode."""
        if inode == pyfuse3.ROOT_INODE or content_view.is_directory(inode):
            return directory_entry(inode)
        layer, node = await self._layer(inode)
        return layer_entry(layer, node)

    @guarded("readlink")
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Target of a symbolic link."""
        layer, node = await self._layer(inode)
        return layer.index.readlink(node)

    @guarded("opendir")
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory."""
        return inode

    @guarded("readdir")
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """List a directory from a position on: `.`, `..`, then the children by name."""
        if fh == pyfuse3.ROOT_INODE:
            await self._list_slots(start_id, token)
            return
        if content_view.is_directory(fh):
            return  # only overlay comes here, and it asks by name
        layer, node = await self._layer(fh)
        index = layer.index
        position = start_id
        while position < _DOTS:
            which = node if position == 0 else index.parent(node)
            position += 1
            if not pyfuse3.readdir_reply(
                token, b"." * position, layer_entry(layer, which), position
            ):
                return
        for at, name, child in index.children(node, position - _DOTS):
            if not pyfuse3.readdir_reply(token, name, layer_entry(layer, child), at + 1 + _DOTS):
                return

    async def _list_slots(self, start: int, token: Any) -> None:
        for slot in self.layers.slots():
            if slot > start:
                try:
                    entry = layer_entry(await self.layers.load(slot), 0)
                except LazysnapError:
                    continue
                if not pyfuse3.readdir_reply(token, b"%d" % slot, entry, slot):
                    return

    @guarded("releasedir")
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""

    @guarded("open")
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; its pages may stay in the kernel's cache."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            raise FUSEError(errno.EROFS)
        return FileInfo(fh=inode, keep_cache=True)

    @guarded("read")
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:
        """Read from a file; short only at its end."""
        layer, node = await self._layer(fh)
        if layer.recorder is not None:
            layer.recorder.note(node, off, size)
        data = layer.reader.read_nowait(node, off, size)
        if data is None:
            token = object()
            activity.waiting[token] = activity.last
            try:
                data = await layer.reader.read(node, off, size)
            finally:
                del activity.waiting[token]
        layer.last_read = activity.last
        activity.read_bytes[0] += len(data)
        return data

    @guarded("release")
    async def release(self, fh: int) -> None:
        """Close a file."""

    @guarded("getxattr")
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute.

        ENOSYS switches them off for the whole mount, for good, which is wanted where there are none.
        """
        if not self.xattrs:
            raise FUSEError(errno.ENOSYS)
        if inode != pyfuse3.ROOT_INODE and not content_view.is_directory(inode):
            layer, node = await self._layer(inode)
            for key, value in layer.xattrs(node):
                if key == name:
                    return value
        raise FUSEError(pyfuse3.ENOATTR)

    @guarded("listxattr")
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Names of the extended attributes."""
        if inode == pyfuse3.ROOT_INODE or content_view.is_directory(inode):
            return []
        layer, node = await self._layer(inode)
        return [key for key, _ in layer.xattrs(node)]

    @guarded("statfs")
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Numbers of the file system that the cache is on, which is what fills up."""
        real = os.statvfs(self.root)
        answer = StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files"):
            setattr(answer, field, getattr(real, field))
        answer.f_ffree = real.f_ffree
        answer.f_favail = real.f_favail
        answer.f_namemax = 255
        return answer

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: inode numbers are computed."""

    @guarded("access")
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Not called, as the kernel checks (`default_permissions`)."""
        return True


def layer_entry(layer: MountedLayer, node: int) -> EntryAttributes:
    """What the kernel is told of a node of a layer."""
    attributes = layer.attributes(node)
    entry = EntryAttributes()
    entry.st_ino = layer.base + node
    entry.entry_timeout = FOR_EVER
    entry.attr_timeout = FOR_EVER
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blocks = (attributes.size + 511) >> 9
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.mtime_ns
    entry.st_atime_ns = attributes.mtime_ns
    return entry


def directory_entry(inode: int) -> EntryAttributes:
    """A directory that is no layer's."""
    entry = EntryAttributes()
    entry.st_ino = inode
    if inode != pyfuse3.ROOT_INODE:
        entry.entry_timeout = entry.attr_timeout = FOR_EVER
    entry.st_mode = stat.S_IFDIR | 0o755
    entry.st_nlink = 2
    return entry
