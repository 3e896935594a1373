# SPDX-License-Identifier: Apache-2.0
"""Indexes of any tree, images of them that are really mounted, and what must be seen there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from lazysnap import mounts
from lazysnap.errors import Internal
from lazysnap.index.build import Layer
from lazysnap.index.codec import encode
from lazysnap.index.content import Content, Contents, Piece
from lazysnap.index.model import NO_KEY, OPAQUE
from lazysnap.index.reader import LayerIndex
from lazysnap.index.tree import Node, Tree
from tests.support import filesystems, layers
from tests.support.indexes import toc_of
from tests.support.tree import quote

EMPTY = toc_of(layers.estargz([]))
KEYS = ("one chunk", "whole digest", "no digest")
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}


def node(
    kind: int = stat.S_IFREG,
    mode: int = 0o644,
    *,
    size: int = 0,
    key: str = KEYS[0],
    link: str = "",
    xattrs: dict[bytes, bytes] | None = None,
    **fields: int,
) -> Node:
    """An inode for `grow`, without the data that its size promises.

    Args:
        kind: type bits.
        mode: permissions.
        size: of a regular file.
        key: what the layer tells of its content, one of `KEYS`.
        link: target of a symbolic link.
        xattrs: extended attributes.
        fields: further ones of `Node`.
    """
    made = Node(kind | mode, children={} if kind == stat.S_IFDIR else None)
    made.xattrs = xattrs or None
    made.link = link
    made.size = len(link.encode()) if kind == stat.S_IFLNK else size
    for name, value in fields.items():
        setattr(made, name, value)
    if size:
        digest = hashlib.sha256(b"%d" % size).digest()
        piece = Piece(0, size, -1, 0, digest if key == KEYS[0] else b"")
        made.content = Content(size, b"" if key == KEYS[2] else digest, [piece])
    return made


def grow(plant: Callable[[Tree], object]) -> LayerIndex:
    """The index of the tree that `plant` grows."""
    tree = Tree()
    plant(tree)
    tree.finish()
    contents = Contents(EMPTY.location, verified=True)
    return LayerIndex(encode(Layer(EMPTY, tree.root, tree.recorded_root, contents, None)))


def names(*pairs: tuple[str, Node]) -> LayerIndex:
    """The index of a tree with these names."""
    return grow(lambda tree: [tree.add(name, made) for name, made in pairs])


@contextlib.contextmanager
def mounted(image: bytes | bytearray, directory: Path) -> Iterator[Path]:
    """Mount an image: the file itself, or through a loop device where the kernel is too old.

    Args:
        image: its bytes.
        directory: for the file and the mountpoint; made if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, target = directory / "image", directory / "mounted"
    file.write_bytes(image)
    target.mkdir(exist_ok=True)
    try:
        mounts.mount(str(file), str(target), "erofs", mounts.MS_RDONLY)
    except Internal:
        with filesystems.mounted(file, target, "ro"):
            yield target
        return
    try:
        yield target
    finally:
        mounts.unmount(str(target), lazy=False)


def check(image: bytes | bytearray, directory: Path) -> None:
    """Let fsck.erofs (erofs-utils) look at an image."""
    file = directory / "checked"
    file.write_bytes(image)
    assert shutil.which("fsck.erofs"), "erofs-utils is not installed: run fixtures/install --dev"
    done = subprocess.run(["fsck.erofs", "-d3", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No errors found" in done.stdout + done.stderr


def expected(index: LayerIndex) -> dict[bytes, dict[str, str]]:
    """What `tests.support.tree.read_tree` must find in an image, without contents."""
    paths: dict[int, list[bytes]] = {}
    left = [(0, b".")]
    while left:
        number, path = left.pop()
        paths.setdefault(number, []).append(path)
        prefix = b"" if number == 0 else path + b"/"
        left.extend((child, prefix + name) for _, name, child in index.children(number))
    found = {}
    for number, places in paths.items():
        for path in places:
            found[path] = fields = _fields(index, number)
            if fields["type"] != "dir" and len(places) > 1:
                fields["same"] = quote(min(places))
    return dict(sorted(found.items()))


def _fields(index: LayerIndex, number: int) -> dict[str, str]:
    status = index.attributes(number)
    kind = _KINDS[stat.S_IFMT(status.mode)]
    fields = {
        "type": kind,
        "mode": f"{stat.S_IMODE(status.mode):04o}",
        "uid": str(status.uid),
        "gid": str(status.gid),
        "mtime": str(status.mtime_ns),
        "nlink": str(status.nlink),
    }
    if kind != "dir":
        fields["size"] = str(status.size)
    if kind in ("char", "block"):
        fields["rdev"] = f"{os.major(status.rdev)}:{os.minor(status.rdev)}"
    if kind == "link":
        fields["target"] = quote(index.readlink(number))
    xattrs = dict(index.xattrs(number))
    if status.flags & OPAQUE:
        xattrs[b"trusted.overlay.opaque"] = b"y"
    if kind == "file" and status.size:
        content = index.file(number)
        name = content.object_key.hex()
        if content.object_key == NO_KEY:
            assert content.partial_key is not None
            name = "p-" + content.partial_key.hex()
        start = name.removeprefix("p-")[:2]
        xattrs[b"trusted.overlay.metacopy"] = b""
        xattrs[b"trusted.overlay.redirect"] = f"/{start}/{name}".encode()
    for key, value in xattrs.items():
        fields[f"xattr:{quote(key)}"] = f"0x{value.hex()}"
    return fields
