# SPDX-License-Identifier: Apache-2.0
"""Dumps a file tree so completely that two trees with equal dumps cannot be told apart by stat.

Independent of the order in which directories are read, of inode numbers and of device numbers of
the file system. Names are bytes, shown with backslash escapes. Does not cross into other mounts.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BLOCK = 1 << 20
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

Tree = Mapping[bytes, Mapping[str, str]]
"""Path relative to the root ("." for the root itself) to field to value; see `read_tree`."""


@dataclass(frozen=True)
class Difference:
    """One field of one path that differs.

    Attributes:
        path: Relative to the root.
        field: A field of `read_tree`, or "exists".
        left: The value in the first tree; empty if the field or the path is not there.
        right: The value in the second tree.
    """

    path: bytes
    field: str
    left: str
    right: str

    def __str__(self) -> str:
        return f"{quote(self.path)}: {self.field}: {self.left or 'none'} != {self.right or 'none'}"


def read_tree(root: str | bytes, *, contents: bool = True) -> dict[bytes, dict[str, str]]:
    """Read a tree.

    Args:
        root: A directory.
        contents: Read the files too; else only what stat and readlink tell.

    Returns:
        For each path, sorted: `type`, `mode` (octal, without the type), `uid`, `gid`, `mtime` (ns),
        `nlink`; `size` (not of directories), `rdev` (devices), `target` (links), `sha256` (files),
        `same` (the first path that is a hard link to the same inode; for files with several
        links), `xattr:<name>` (hexadecimal). The `type` of a name that is listed but cannot be
        looked up is `listed only`: overlayfs shows a whiteout that hides nothing so.

    Raises:
        OSError: Something could not be read.
    """
    base = os.fsencode(root)
    found: dict[bytes, dict[str, str]] = {}
    inodes: dict[tuple[int, int], list[bytes]] = {}
    for path, inside, status in _walk(base):
        if status is None:
            found[inside] = {"type": "listed only"}
            continue
        found[inside] = fields = _describe(path, status)
        if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
            if contents and stat.S_ISREG(status.st_mode):
                fields["sha256"] = _digest(path, status.st_size)
        else:
            inodes.setdefault((status.st_dev, status.st_ino), []).append(inside)
    for paths in inodes.values():
        first = min(paths)
        is_file = found[first]["type"] == "file"
        digest = _digest(os.path.join(base, first), None) if contents and is_file else ""
        for path in paths:
            found[path]["same"] = quote(first)
            if digest:
                found[path]["sha256"] = digest
    return dict(sorted(found.items()))


def dump_tree(root: str | bytes, *, contents: bool = True) -> list[str]:
    """`read_tree` as one line per path, sorted by path."""
    return [
        " ".join([quote(path), *(f"{name}={value}" for name, value in fields.items())])
        for path, fields in read_tree(root, contents=contents).items()
    ]


def differences(left: Tree, right: Tree) -> list[Difference]:
    """What differs, sorted by path; a path that is in one tree only counts once."""
    found = []
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            found.append(
                Difference(
                    path, "exists", one["type"] if one else "", other["type"] if other else ""
                )
            )
            continue
        if one == other:
            continue
        found.extend(
            Difference(path, name, one.get(name, ""), other.get(name, ""))
            for name in sorted(one.keys() | other.keys())
            if one.get(name) != other.get(name)
        )
    return found


def report(found: list[Difference], limit: int = 40) -> str:
    """Differences as text: a count by field, then the first ones."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.field] = counts.get(one.field, 0) + 1
    lines = [f"{len(found)} differences: " + ", ".join(f"{k} {n}" for k, n in counts.items())]
    lines += [str(one) for one in found[:limit]]
    if len(found) > limit:
        lines.append(f"... and {len(found) - limit} more")
    return "\n".join(lines)


def quote(name: bytes) -> str:
    """A name for people and for one line: printable ASCII as it is, the rest escaped."""
    return "".join(chr(c) if 0x20 < c < 0x7F and c != 0x5C else f"\\x{c:02x}" for c in name)


def _walk(base: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result | None]]:
    top = os.lstat(base)
    yield base, b".", top
    folders = [(base, b"")]
    while folders:
        folder, prefix = folders.pop()
        for name in os.listdir(folder):
            path = folder + b"/" + name
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                yield path, prefix + name, None
                continue
            yield path, prefix + name, status
            # overlayfs reports its own device for every directory, so a change is a mount.
            if stat.S_ISDIR(status.st_mode) and status.st_dev == top.st_dev:
                folders.append((path, prefix + name + b"/"))


def _describe(path: bytes, status: os.stat_result) -> dict[str, str]:
    kind = stat.S_IFMT(status.st_mode)
    fields = {
        "type": _KINDS[kind],
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "uid": str(status.st_uid),
        "gid": str(status.st_gid),
        "mtime": str(status.st_mtime_ns),
        "nlink": str(status.st_nlink),
    }
    if kind != stat.S_IFDIR:
        fields["size"] = str(status.st_size)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        fields["rdev"] = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if kind == stat.S_IFLNK:
        fields["target"] = quote(os.readlink(path))
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        value = os.getxattr(path, name, follow_symlinks=False)
        fields[f"xattr:{quote(os.fsencode(name))}"] = f"0x{value.hex()}"
    return fields


def _digest(path: bytes, size: int | None) -> str:
    digest = hashlib.sha256()
    if size == 0:
        return digest.hexdigest()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        while data := os.read(fd, _BLOCK):
            digest.update(data)
    finally:
        os.close(fd)
    return digest.hexdigest()
