# SPDX-License-Identifier: Apache-2.0
"""The tree of one layer, grown entry by entry as containerd would unpack it.

Follows containerd's archive.Apply: names are cleaned and confined to the root, parents may lead
through symbolic links of the same layer, missing parents are made, a directory over a directory
changes attributes only, anything else replaces what was there with all that is below. Two things
differ on purpose: hard links may point to names that come later, as stargz-snapshotter allows, and
whiteouts become devices only at the end, as the image specification says that a layer's whiteouts
do not hide its own files. Knows nothing of chunks or bytes.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import msgspec

from lazysnap.errors import FormatError, NotLazy
from lazysnap.index.model import IMPLIED, LISTED_ROOT, OPAQUE, WHITEOUT

if TYPE_CHECKING:
    from lazysnap.index.content import Content

MAX_NODES = 2_000_000
_MAX_NAME = 255
_MAX_PATH = 4096
# In one path, as containerd's RootPath; why this walk is not `layers.links.follow` is said there.
_MAX_LINKS = 255
_MAX_STEPS = 20_000_000  # through symbolic links, in all paths together
_WHITEOUT_PREFIX = ".wh."
_OPAQUE_MARKER = ".wh..wh..opq"
_PENDING = 0  # the mode of a hard link whose target has not been seen yet


class Node(msgspec.Struct, eq=False, gc=False):
    """An inode while the tree grows. No node knows those above it, so there are no cycles."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    content: Content | None = None
    children: dict[bytes, Node] | None = None
    link: str = ""
    xattrs: dict[bytes, bytes] | None = None
    rdev: int = 0
    flags: int = 0
    nlink: int = 0
    number: int = -1  # given by whoever writes the tree down
    path_length: int = 0  # of directories, in bytes


def directory(mode: int = 0o755, flags: int = 0) -> Node:
    """An empty directory."""
    return Node(stat.S_IFDIR | mode, children={}, flags=flags)


def clean(name: str) -> list[str]:
    """The components of Go's path.Clean("/" + name): `..` never leads out of the root."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part and part != ".":
            parts.append(part)
    return parts


def check_text(text: str, what: str) -> None:
    """Refuse text that cannot be the name or link target it was made from.

    Raises:
        FormatError: it holds a NUL.
        NotLazy: reason `non-utf8-names`: it holds U+FFFD, which the writers of tables of contents
            put where bytes are not UTF-8, so that the true name is lost.
    """
    if "\0" in text:
        raise FormatError(f"{what} holds a NUL: {text[:100]!r}")
    if "\ufffd" in text:
        raise NotLazy(
            f"{what} is not UTF-8 in the layer and lost in its table of contents: {text[:100]!r}",
            reason="non-utf8-names",
        )


class Tree:
    """Grows a tree; `finish` once after the last entry."""

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self.root = directory()
        self.recorded_root: Node | None = None
        self._left = max_nodes
        self._steps = _MAX_STEPS
        # Directories by the text before the last slash of a name: most entries follow a sibling.
        self._directories: dict[str, Node] = {"": self.root}
        self._whiteouts: list[tuple[Node, bytes, int]] = []
        self._pending: list[tuple[Node, bytes, Node]] = []

    def add(self, name: str, node: Node) -> None:
        """Put a node at its name, as unpacking its entry now would.

        Raises:
            FormatError: an unpack would fail here.
            NotLazy: the name is lost.
        """
        place = self._place(name)
        if place is None:
            self._list_root(node)
            return
        parent, base = place
        if base.startswith(_WHITEOUT_PREFIX):
            self._mark(parent, base, node)
            return
        key = self._key(parent, base)
        assert parent.children is not None
        old = parent.children.get(key)
        if old is not None:
            if old.children is not None and node.children is not None:
                _merge(old, node)
                old.flags &= ~IMPLIED
                return
            if old.children is not None or stat.S_ISLNK(old.mode):
                self._directories = {"": self.root}
        self._count()
        if node.children is not None:
            node.path_length = parent.path_length + 1 + len(key)
        parent.children[key] = node

    def link(self, name: str, target: str, node: Node) -> None:
        """Put a hard link at its name.

        Args:
            name: of the new name.
            target: the other name, as written in the layer.
            node: attributes of the entry; an unpack sets them on the shared inode.

        Raises:
            FormatError: an unpack would fail here.
            NotLazy: the name is lost.
        """
        check_text(target, "link target")
        found = self._find(clean(target))
        if found is None or found.mode == _PENDING:
            pending = Node(_PENDING, link=target)
            place = self._place(name)
            if place is None:
                return
            self.add(name, pending)
            parent, base = place
            self._pending.append((parent, base.encode(), pending))
            return
        if found.children is not None:
            raise FormatError(f"hard link {name[:200]!r} to the directory {target[:200]!r}")
        if not stat.S_ISLNK(found.mode):
            node.mode |= stat.S_IFMT(found.mode)
            _merge(found, node)
        self.add(name, found)

    def finish(self) -> None:
        """Resolve hard links to later names, and put the whiteouts where nothing is.

        Raises:
            FormatError: a hard link without an end; reason `hardlink-outside-layer` if its target
                is not in the layer.
        """
        ends: dict[Node, Node] = {}
        for parent, key, pending in self._pending:
            children = parent.children
            if children is not None and children.get(key) is pending:
                children[key] = self._end(pending, ends)
        for parent, key, mtime_ns in self._whiteouts:
            children = parent.children
            assert children is not None
            if key not in children:
                self._count()
                children[key] = Node(stat.S_IFCHR, mtime_ns=mtime_ns, flags=WHITEOUT)

    def _end(self, pending: Node, ends: dict[Node, Node]) -> Node:
        """The inode that a chain of hard links leads to."""
        seen: dict[Node, None] = {}
        node = pending
        while node.mode == _PENDING and node not in ends:
            if node in seen:
                raise FormatError(f"hard links to {pending.link[:200]!r} go round in a circle")
            seen[node] = None
            found = self._find(clean(node.link))
            if found is None:
                raise FormatError(
                    f"hard link to {node.link[:200]!r}, which is not in the layer",
                    reason="hardlink-outside-layer",
                )
            node = found
        end = ends.get(node, node)
        if end.children is not None:
            raise FormatError(f"hard link to the directory {pending.link[:200]!r}")
        ends.update(dict.fromkeys(seen, end))
        return end

    def _place(self, name: str) -> tuple[Node, str] | None:
        """The directory and the last component of a name; None for the root."""
        check_text(name, "name")
        head, _, base = name.rstrip("/").rpartition("/")
        if base in ("", ".", ".."):
            parts = clean(name)
            if not parts:
                return None
            head, base = "/".join(parts[:-1]), parts[-1]
        parent = self._directories.get(head)
        if parent is None:
            parent = self._walk(clean(head))
            self._directories[head] = parent
        return parent, base

    def _key(self, parent: Node, base: str) -> bytes:
        key = base.encode()
        if len(key) > _MAX_NAME:
            raise FormatError(f"name of {len(key)} bytes: {base[:100]!r}...")
        if parent.path_length + 1 + len(key) > _MAX_PATH:
            raise FormatError(f"path of more than {_MAX_PATH} bytes that ends in {base[:100]!r}")
        return key

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise FormatError("the layer has too many files and directories")

    def _walk(self, parts: list[str]) -> Node:
        """The directory at a path, through symbolic links; made if it is missing."""
        node = self._follow(parts, make=True)
        assert node is not None
        return node

    def _find(self, parts: list[str]) -> Node | None:
        """What is at a path; links are followed except the last component."""
        if not parts:
            return self.root
        parent = self._follow(parts[:-1], make=False)
        if parent is None or parent.children is None:
            return None
        return parent.children.get(parts[-1].encode())

    def _follow(self, parts: list[str], *, make: bool) -> Node | None:
        stack = [self.root]
        todo = parts[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                if len(stack) > 1:
                    stack.pop()
                continue
            here = stack[-1]
            assert here.children is not None
            child = here.children.get(part.encode())
            if child is None:
                if not make:
                    return None
                child = self._imply(here, part)
            if child.children is not None:
                stack.append(child)
            elif stat.S_ISLNK(child.mode):
                links += 1
                steps = [step for step in child.link.split("/") if step and step != "."]
                self._steps -= len(steps) + 1
                if links > _MAX_LINKS or self._steps < 0:
                    raise FormatError(f"too many symbolic links on the way to {parts[-1][:100]!r}")
                if child.link.startswith("/"):
                    del stack[1:]
                todo.extend(reversed(steps))
            else:
                raise FormatError(f"{part[:100]!r} has entries below it but is not a directory")
        return stack[-1]

    def _imply(self, parent: Node, base: str) -> Node:
        """A directory that an entry needs and the layer does not list."""
        if base.startswith(_WHITEOUT_PREFIX):
            raise FormatError(f"a directory has the name of a whiteout: {base[:100]!r}")
        key = self._key(parent, base)
        self._count()
        node = directory(flags=IMPLIED)
        node.path_length = parent.path_length + 1 + len(key)
        assert parent.children is not None
        parent.children[key] = node
        return node

    def _mark(self, parent: Node, base: str, node: Node) -> None:
        """Note a whiteout or an opaque marker."""
        if base == _OPAQUE_MARKER:
            parent.flags |= OPAQUE
            return
        hidden = base.removeprefix(_WHITEOUT_PREFIX)
        if hidden in ("", ".", ".."):
            raise FormatError(f"whiteout of nothing: {base!r}")
        self._whiteouts.append((parent, self._key(parent, hidden), node.mtime_ns))

    def _list_root(self, node: Node) -> None:
        """Record the root's entry; an unpack ignores it, whatever it is."""
        if node.children is not None:
            self.recorded_root = node
            self.root.flags |= LISTED_ROOT


def _merge(old: Node, new: Node) -> None:
    """Set the attributes of an inode again, as chown, chmod, setxattr and utimes would."""
    old.mode, old.uid, old.gid, old.mtime_ns = new.mode, new.uid, new.gid, new.mtime_ns
    if new.xattrs:
        old.xattrs = {**(old.xattrs or {}), **new.xattrs}
