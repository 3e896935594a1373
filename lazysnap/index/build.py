# SPDX-License-Identifier: Apache-2.0
"""From a verified table of contents to the tree and chunks of a layer, in memory.

What a layer looks like is decided here and in `tree`: as containerd would unpack it, except for
what only lazy layers have (landmarks) and what must not come from a layer (attributes in the
namespaces of overlayfs).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from lazysnap.errors import FormatError
from lazysnap.formats import toc
from lazysnap.formats.toc import Entry
from lazysnap.formats.verify import VerifiedToc
from lazysnap.index.content import Contents
from lazysnap.index.tree import MAX_NODES, Node, Tree, check_text, clean

PREFETCH_LANDMARK = ".prefetch.landmark"
NO_PREFETCH_LANDMARK = ".no.prefetch.landmark"

_TYPES = {
    "dir": stat.S_IFDIR,
    "reg": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "hardlink": 0,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}
_MAX_ID = 2**32 - 2  # 2**32 - 1 means "leave it" to chown
_MAX_TARGET = 4095
_MAX_XATTR_NAME, _MAX_XATTR_VALUE = 255, 65536


@dataclass(slots=True)
class Layer:
    """A layer's tree and chunks while they are built; `encode` makes an index of it."""

    toc: VerifiedToc
    root: Node
    recorded_root: Node | None
    contents: Contents
    prefetch_end: int | None


def build(
    table: VerifiedToc, *, max_entries: int = toc.MAX_ENTRIES, max_nodes: int = MAX_NODES
) -> Layer:
    """Build the tree of a layer.

    Args:
        table: the table of contents. If it was trusted without a check, chunks without digests are
            accepted too.
        max_entries: the greatest number of entries accepted.
        max_nodes: the greatest number of files and directories accepted, with implied ones.

    Raises:
        FormatError: the table of contents contradicts itself, or an unpack would fail;
            reason `hardlink-outside-layer` if it needs files of other layers.
        NotLazy: reasons `non-utf8-names`, `chunk-too-large`, `too-costly`, `unverified-chunks`.
    """
    builder = _Builder(table, max_nodes)
    for entry in toc.entries(table.json, max_entries):
        builder.add(entry)
    return builder.finish()


class _Builder:
    """Turns entries into nodes and contents."""

    def __init__(self, table: VerifiedToc, max_nodes: int) -> None:
        self.table = table
        self.tree = Tree(max_nodes)
        self.contents = Contents(table.location, verified=table.verified)
        self.prefetch_end: int | None = None
        self.file: Node | None = None  # the regular file whose chunks may follow
        self.chunks: list[Entry] = []
        self.time = ("", 0)  # the last one, as many are equal

    def add(self, entry: Entry) -> None:
        """Take the next entry."""
        if entry.type == "chunk":
            if self.file is None or entry.name not in ("", self.chunks[0].name):
                raise FormatError(f"a chunk of {entry.name[:200]!r} does not follow its file")
            self.chunks.append(entry)
            return
        if self.file is not None:
            self._end_file()
        kind = _TYPES.get(entry.type)
        if kind is None:
            raise FormatError(f"{entry.name[:200]!r} is of the unknown type {entry.type[:100]!r}")
        node = self._node(entry, kind)
        if kind == stat.S_IFREG:
            node.content = self.contents.collect_one(entry)
            if node.content is None:
                self.file = node
                self.chunks = [entry]
            if "landmark" in entry.name and self._is_landmark(entry):
                return
        if entry.type == "hardlink":
            self.tree.link(entry.name, entry.link_name, node)
        else:
            self.tree.add(entry.name, node)

    def finish(self) -> Layer:
        """Settle what only the end decides."""
        self._end_file()
        tree = self.tree
        tree.finish()
        return Layer(self.table, tree.root, tree.recorded_root, self.contents, self.prefetch_end)

    def _end_file(self) -> None:
        if self.file is not None:
            self.file.content = self.contents.collect(self.chunks)
            self.file = None

    def _is_landmark(self, entry: Entry) -> bool:
        """Note a landmark, see stargz-snapshotter docs/estargz.md; it is not part of the tree."""
        parts = clean(entry.name)
        if parts == [NO_PREFETCH_LANDMARK]:
            self.prefetch_end = 0
        elif parts == [PREFETCH_LANDMARK]:
            if not 0 <= entry.offset <= self.table.location.data_end:
                raise FormatError(f"the prefetch landmark is at {entry.offset}, outside the data")
            self.prefetch_end = entry.offset
        else:
            return False
        return True

    def _node(self, entry: Entry, kind: int) -> Node:
        uid, gid = entry.uid, entry.gid
        if not (0 <= uid <= _MAX_ID and 0 <= gid <= _MAX_ID):
            raise FormatError(f"{entry.name[:200]!r} is owned by {uid}:{gid}")
        text, mtime_ns = self.time
        if entry.modtime != text:
            mtime_ns = toc.parse_time(entry.modtime)
            self.time = (entry.modtime, mtime_ns)
        node = Node(kind | (entry.mode & 0o7777), uid, gid, mtime_ns)
        if entry.xattrs:
            node.xattrs = _xattrs(entry, kind)
        if kind == stat.S_IFREG:
            node.size = entry.size
        elif kind == stat.S_IFDIR:
            node.children = {}
        elif kind == stat.S_IFLNK:
            check_text(entry.link_name, "link target")
            node.mode = stat.S_IFLNK | 0o777
            node.link = entry.link_name
            node.size = len(entry.link_name.encode())
            if not 0 < node.size <= _MAX_TARGET:
                raise FormatError(f"{entry.name[:200]!r} links to {node.size} bytes")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            if not (0 <= entry.dev_major < 1 << 12 and 0 <= entry.dev_minor < 1 << 20):
                raise FormatError(f"{entry.name[:200]!r} has an impossible device number")
            node.rdev = os.makedev(entry.dev_major, entry.dev_minor)
        return node


def _xattrs(entry: Entry, kind: int) -> dict[bytes, bytes] | None:
    """The attributes that an unpack would set.

    Linux refuses `user.*` on what is neither file nor directory, and unknown namespaces;
    containerd goes on without them. It never sets `trusted.*`.
    """
    assert entry.xattrs is not None
    kept: dict[bytes, bytes] = {}
    for name, value in entry.xattrs.items():
        check_text(name, "name of an extended attribute")
        if name.startswith("user."):
            if name.startswith("user.overlay.") or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                continue
        elif not name.startswith(("security.", "system.")):
            continue
        key = name.encode()
        if len(key) > _MAX_XATTR_NAME or len(value or b"") > _MAX_XATTR_VALUE:
            raise FormatError(f"{entry.name[:200]!r} has an oversized attribute {name[:100]!r}")
        kept[key] = value or b""
    return kept or None
