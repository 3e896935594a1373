# SPDX-License-Identifier: Apache-2.0
"""What a tar looks like when unpacked, worked out with the standard library's tarfile.

An oracle for lazysnap/index: the same text form as lazysnap/index/dump.py, but another way there.
Names must be clean and parents must not lead through symbolic links. Times of directories that the
tar does not list are 0.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from urllib.parse import quote_from_bytes

_KINDS = {
    tarfile.DIRTYPE: "dir",
    tarfile.REGTYPE: "reg",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
_HIDDEN = (".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json")


@dataclass
class Inode:
    kind: str
    info: tarfile.TarInfo | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)
    data: bytes = b""
    opaque: bool = False


def contents(tar: bytes) -> dict[str, bytes]:
    """The data of every name of a regular file."""
    return {path: node.data for path, node in _unpack(tar).items() if node.kind == "reg"}


def describe(tar: bytes) -> list[str]:
    """The tree as text, as `lazysnap.index.dump.dump` gives it."""
    tree = _unpack(tar)
    names: dict[int, int] = {}
    for node in tree.values():
        names[id(node)] = names.get(id(node), 0) + 1
    subdirs: dict[str, int] = {}
    for path, node in tree.items():
        if node.kind == "dir" and path:
            parent = path.rpartition("/")[0]
            subdirs[parent] = subdirs.get(parent, 0) + 1
    lines = []
    for path in sorted(tree, key=lambda p: [part.encode() for part in p.split("/")]):
        node = tree[path]
        nlink = 2 + subdirs.get(path, 0) if node.kind == "dir" else names[id(node)]
        lines.append(_line(path, node, nlink))
    return lines


def _unpack(tar: bytes) -> dict[str, Inode]:
    """Paths (`/a/b`, the root is empty) to inodes."""
    tree = {"": Inode("dir")}
    whiteouts: dict[str, Inode] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for info in archive:
            name = info.name.removeprefix("./").strip("/")
            path = "/" + name
            if name in ("", ".", *_HIDDEN):
                continue
            parent, _, base = path.rpartition("/")
            _imply(tree, parent)
            if base == ".wh..wh..opq":
                tree[parent].opaque = True
            elif base.startswith(".wh."):
                whiteouts[f"{parent}/{base[4:]}"] = Inode("char", info)
            else:
                if not (info.isdir() and path in tree and tree[path].kind == "dir"):
                    for marker in [m for m in whiteouts if m.startswith(path + "/")]:
                        del whiteouts[marker]
                _place(tree, path, info, archive)
    for path, node in whiteouts.items():
        tree.setdefault(path, node)
    return tree


def _imply(tree: dict[str, Inode], path: str) -> None:
    for end, char in enumerate(path + "/"):
        if char == "/" and end:
            tree.setdefault(path[:end], Inode("dir"))


def _place(
    tree: dict[str, Inode], path: str, info: tarfile.TarInfo, archive: tarfile.TarFile
) -> None:
    xattrs = {
        key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
        for key, value in info.pax_headers.items()
        if key.startswith("SCHILY.xattr.")
    }
    merges = info.isdir() and path in tree and tree[path].kind == "dir"
    if not merges:
        for below in [p for p in tree if p.startswith(path + "/")]:
            del tree[below]
    if info.islnk():
        node = tree["/" + info.linkname.strip("/")]
        if node.kind != "symlink":
            node.info = info
            node.xattrs |= xattrs
    elif merges:
        node = tree[path]
        node.info = info
        node.xattrs |= xattrs
    else:
        node = Inode(_KINDS[info.type], info, xattrs)
        if info.isreg():
            reader = archive.extractfile(info)
            assert reader is not None
            node.data = reader.read()
    tree[path] = node


def _line(path: str, node: Inode, nlink: int) -> str:
    info = node.info
    whiteout = info is not None and info.name.rpartition("/")[2].startswith(".wh.")
    mode, owner, mtime = 0o755, "0:0", 0
    if info is not None:
        seconds, _, fraction = str(info.pax_headers.get("mtime", int(info.mtime))).partition(".")
        mtime = int(seconds) * 10**9 + int(fraction.ljust(9, "0"))
        mode, owner = info.mode, f"{info.uid}:{info.gid}"
    if whiteout:
        mode, owner = 0, "0:0"
    if node.kind == "symlink":
        mode = 0o777
    quoted = quote_from_bytes((path or "/").encode())
    fields = [quoted, node.kind, f"{mode:04o}", owner, f"nlink={nlink}"]
    if node.kind in ("char", "block"):
        assert info is not None
        rdev = (0, 0) if whiteout else (info.devmajor, info.devminor)
        fields.append("rdev={}:{}".format(*rdev))
    if node.kind == "reg":
        fields.append(f"size={len(node.data)}")
    fields.append(f"mtime={mtime}")
    if node.kind == "symlink":
        assert info is not None
        fields.append("target=" + quote_from_bytes(info.linkname.encode()))
    fields += [f"xattr:{name}={value.hex()}" for name, value in sorted(node.xattrs.items())]
    if node.kind == "reg" and node.data:
        fields.append("sha256=" + hashlib.sha256(node.data).hexdigest())
    if node.kind == "dir" and info is None and path:
        fields.append("implied")
    if node.opaque:
        fields.append("opaque")
    if whiteout:
        fields.append("whiteout")
    return " ".join(fields)
