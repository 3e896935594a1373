# SPDX-License-Identifier: Apache-2.0
"""An index as text, one line for each path: for tests and for people who look into a layer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from urllib.parse import quote_from_bytes

from lazysnap.index.model import IMPLIED, NO_KEY, OPAQUE, WHITEOUT
from lazysnap.index.reader import LayerIndex

_TYPES = {
    stat.S_IFDIR: "dir",
    stat.S_IFREG: "reg",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}
_FLAGS = ((IMPLIED, "implied"), (OPAQUE, "opaque"), (WHITEOUT, "whiteout"))


def dump(index: LayerIndex) -> Iterator[str]:
    """The paths of a layer, depth first with names sorted, starting with the root.

    Yields:
        `path type mode uid:gid nlink=N`, then as far as they apply `rdev=MAJOR:MINOR`, `size=N`,
        `mtime=NANOSECONDS`, `target=...`, `xattr:NAME=HEX`, `sha256=HEX`, and flags. Names are
        quoted as in URLs.
    """
    stack: list[tuple[bytes, int]] = [(b"/", 0)]
    while stack:
        path, node = stack.pop()
        yield _line(index, path, node)
        base = path if node == 0 else path + b"/"
        names = [(base + name, child) for _, name, child in index.children(node)]
        stack.extend(reversed(names))


def _line(index: LayerIndex, path: bytes, node: int) -> str:
    found = index.attributes(node)
    kind = stat.S_IFMT(found.mode)
    fields = [
        quote_from_bytes(path),
        _TYPES.get(kind, "unknown"),
        f"{stat.S_IMODE(found.mode):04o}",
        f"{found.uid}:{found.gid}",
        f"nlink={found.nlink}",
    ]
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        fields.append(f"rdev={os.major(found.rdev)}:{os.minor(found.rdev)}")
    if kind == stat.S_IFREG:
        fields.append(f"size={found.size}")
    fields.append(f"mtime={found.mtime_ns}")
    if kind == stat.S_IFLNK:
        fields.append("target=" + quote_from_bytes(index.readlink(node)))
    fields += [f"xattr:{quote_from_bytes(n)}={v.hex()}" for n, v in index.xattrs(node)]
    if kind == stat.S_IFREG and found.size:
        key = index.file(node).object_key
        fields.append("sha256=" + ("unknown" if key == NO_KEY else key.hex()))
    fields += [name for flag, name in _FLAGS if found.flags & flag]
    return " ".join(fields)
