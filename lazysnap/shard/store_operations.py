# SPDX-License-Identifier: Apache-2.0
"""The FUSE requests of a shard that serves an additional layer store, beside those of any shard.

Clients (containers/storage) count their references by requests that must fail with ENOENT: to create
`use` in a layer's directory adds one, to remove that directory takes one off. Directories of names are not
listed, so that nobody walks into layers by accident. All other writes are refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from typing import Any, Never

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from lazysnap.errors import NotFound
from lazysnap.layers.store_names import NamedLayer
from lazysnap.shard import content_view, store_view
from lazysnap.shard.blobs import WholeBlobs
from lazysnap.shard.mounted_layers import MountedLayers
from lazysnap.shard.operations import FOR_EVER, Operations, directory_entry, guarded, layer_entry

_USE = b"use"
_WRITES = (
    "link", "mkdir", "mknod", "removexattr", "rename", "setattr", "setxattr", "symlink", "unlink",
)  # fmt: skip


class StoreOperations(Operations):
    """Handlers for pyfuse3.

    Args:
        layers: what is mounted here.
        root: lazysnap's root directory.
        view: what names mean.
        blobs: of the layers, whole.
    """

    NAMES = (*Operations.NAMES, "create", "rmdir", *_WRITES)

    def __init__(
        self, layers: MountedLayers, root: str, view: store_view.StoreView, blobs: WholeBlobs
    ) -> None:
        super().__init__(layers, root, xattrs=True)
        self.view = view
        self.blobs = blobs

    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Look a name up in a directory."""
        if store_view.is_named(parent) or parent == pyfuse3.ROOT_INODE:
            return await self._lookup_named(parent, name)
        return await super().lookup(parent, name, ctx)

    @guarded("lookup")
    async def _lookup_named(self, parent: int, name: bytes) -> EntryAttributes:
        if parent == pyfuse3.ROOT_INODE:
            # No slots: the kernel has one place for a directory, and for layers that is `diff`.
            if name == store_view.NAME:
                return _entry(store_view.ROOT, stat.S_IFDIR | 0o755)
            if name == content_view.NAME:
                return directory_entry(content_view.ROOT)
            raise FUSEError(errno.ENOENT)
        if parent == store_view.ROOT:
            image = self.view.image(name)
            if image is None:
                raise FUSEError(errno.ENOENT)
            return _entry(image, stat.S_IFDIR | 0o755)
        if store_view.is_image(parent):
            if not self.view.known(parent):
                raise FUSEError(errno.ESTALE)  # the kernel then looks the directory up again
            found = await self.view.find(parent, name)
            if found is None:  # not remembered: another time it may be there
                raise FUSEError(errno.ENOENT)
            return _entry(store_view.inode_of(found.slot, store_view.LAYER), stat.S_IFDIR | 0o755)
        slot, _ = store_view.slot_of(parent)
        self._name(slot)
        if name == store_view.DIFF_NAME:
            return layer_entry(await self.layers.load(slot), 0)
        if name not in store_view.FILES:
            raise FUSEError(errno.ENOENT)
        return await self._file(slot, store_view.FILES[name])

    def _name(self, slot: int) -> NamedLayer:
        found = self.view.layer(slot)
        if found is None:
            raise FUSEError(errno.ESTALE)
        return found

    async def _file(self, slot: int, what: int) -> EntryAttributes:
        if what == store_view.INFO:
            return _entry(
                store_view.inode_of(slot, what), stat.S_IFREG | 0o444, len(self._name(slot).info)
            )
        layer = await self.layers.load(slot)
        return _entry(store_view.inode_of(slot, what), stat.S_IFREG | 0o400, layer.record.blob_size)

    async def getattr(self, inode: int, ctx: RequestContext | None) -> EntryAttributes:
        """Attributes of an inode."""
        if store_view.is_named(inode):
            return await self._getattr_named(inode)
        return await super().getattr(inode, ctx)

    @guarded("getattr")
    async def _getattr_named(self, inode: int) -> EntryAttributes:
        slot, what = store_view.slot_of(inode)
        if inode == store_view.ROOT or store_view.is_image(inode) or what == store_view.LAYER:
            return _entry(inode, stat.S_IFDIR | 0o755)
        return await self._file(slot, what)

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """List a directory; those of names show nothing."""
        if fh != pyfuse3.ROOT_INODE and not store_view.is_named(fh):
            await super().readdir(fh, start_id, token)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; for a blob, when all of it is here and was checked."""
        if store_view.is_named(inode):
            return await self._open_named(inode, flags)
        return await super().open(inode, flags, ctx)

    @guarded("open")
    async def _open_named(self, inode: int, flags: int) -> FileInfo:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            raise FUSEError(errno.EROFS)
        slot, what = store_view.slot_of(inode)
        self._name(slot)
        if what == store_view.BLOB:
            await self.blobs.open(slot)
            # It is read once, so the kernel need not keep it.
            return FileInfo(fh=inode, keep_cache=False)
        return FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:
        """Read from a file; short only at its end."""
        if store_view.is_named(fh):
            return await self._read_named(fh, off, size)
        return await super().read(fh, off, size)

    @guarded("read")
    async def _read_named(self, fh: int, off: int, size: int) -> bytes:
        slot, what = store_view.slot_of(fh)
        if what == store_view.INFO:
            return self._name(slot).info[off : off + size]
        return await self.blobs.read(slot, off, size)

    async def release(self, fh: int) -> None:
        """Close a file."""
        if store_view.is_named(fh):
            slot, what = store_view.slot_of(fh)
            if what == store_view.BLOB:
                self.blobs.release(slot)
            return
        await super().release(fh)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute."""
        if store_view.is_named(inode):
            raise FUSEError(pyfuse3.ENOATTR)
        value: bytes = await super().getxattr(inode, name, ctx)
        return value

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """Names of the extended attributes."""
        return [] if store_view.is_named(inode) else await super().listxattr(inode, ctx)

    @guarded("create")
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """A client uses a layer; must fail with ENOENT."""
        if not _is_layer(parent) or name != _USE:
            raise FUSEError(errno.EROFS)
        slot, _ = store_view.slot_of(parent)
        self._name(slot)
        try:
            await self.view.note("used", slot, ctx.pid)
        except NotFound as error:
            raise FUSEError(errno.ESTALE) from error  # the kernel then looks the directory up again
        raise FUSEError(errno.ENOENT)

    @guarded("rmdir")
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        """A client does not use a layer any more; must fail with ENOENT."""
        if not store_view.is_named(parent) or not store_view.is_image(parent):
            raise FUSEError(errno.EROFS)
        if self.view.known(parent):
            found = self.view.get(parent, name)
            if found is not None:
                with contextlib.suppress(NotFound):
                    await self.view.note("released", found.slot, ctx.pid)
        raise FUSEError(errno.ENOENT)

    async def _refuse(self, *arguments: object) -> Never:
        raise FUSEError(errno.EROFS)

    link = mkdir = mknod = removexattr = rename = _refuse
    setattr = setxattr = symlink = unlink = _refuse


def _is_layer(inode: int) -> bool:
    return (
        store_view.is_named(inode)
        and not store_view.is_image(inode)
        and store_view.slot_of(inode)[1] == store_view.LAYER
        and inode != store_view.ROOT
    )


def _entry(inode: int, mode: int, size: int = 0) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = inode
    entry.entry_timeout = entry.attr_timeout = FOR_EVER
    entry.st_mode = mode
    entry.st_nlink = 2 if stat.S_ISDIR(mode) else 1
    entry.st_size = size
    entry.st_blocks = (size + 511) >> 9
    return entry
