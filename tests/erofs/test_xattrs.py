# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest

from lazysnap.erofs.image import build
from lazysnap.erofs.xattrs import redirect
from lazysnap.errors import FormatError
from lazysnap.index.model import NO_KEY, FileContent
from tests.erofs.scene import check, expected, mounted, names, node
from tests.support import filesystems
from tests.support.tree import read_tree

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"


def acl(*entries: tuple[int, int, int], version: int = 2) -> bytes:
    """An ACL in the form of linux/posix_acl_xattr.h: tags, permissions, ids."""
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NONE = 2**32 - 1
USER_OBJ, GROUP_OBJ, OTHER, MASK = (1, 7, NONE), (4, 5, NONE), (0x20, 0, NONE), (0x10, 5, NONE)
USER, GROUP = (2, 6, 1000), (8, 4, 50)
GOOD_ACLS = {
    "minimal": acl(USER_OBJ, GROUP_OBJ, OTHER),
    "mask": acl(USER_OBJ, GROUP_OBJ, MASK, OTHER),
    "named": acl(USER_OBJ, USER, (2, 0, 1001), GROUP_OBJ, GROUP, MASK, OTHER),
}
BAD_ACLS = {
    "version": acl(USER_OBJ, GROUP_OBJ, OTHER, version=1),
    "length": acl(USER_OBJ, GROUP_OBJ, OTHER) + b"x",
    "short": b"\2",
    "no mask": acl(USER_OBJ, USER, GROUP_OBJ, OTHER),
    "no other": acl(USER_OBJ, GROUP_OBJ),
    "order": acl(GROUP_OBJ, USER_OBJ, OTHER),
    "two owners": acl(USER_OBJ, USER_OBJ, GROUP_OBJ, OTHER),
    "tag": acl(USER_OBJ, GROUP_OBJ, (0x40, 7, NONE), OTHER),
    "large tag": acl(USER_OBJ, GROUP_OBJ, (0x101, 7, NONE), OTHER),
    "permissions": acl((1, 8, NONE), GROUP_OBJ, OTHER),
    "nobody": acl(USER_OBJ, (2, 7, NONE), GROUP_OBJ, MASK, OTHER),
}


def refused(xattrs: dict[bytes, bytes], kind: int = stat.S_IFREG) -> bool:
    """Whether an image with these extended attributes cannot be built, for the one right reason."""
    link = "target" if kind == stat.S_IFLNK else ""
    try:
        build(names(("x", node(kind, xattrs=xattrs, link=link))))
    except FormatError as error:
        assert error.reason == "xattr-not-storable"
        return True
    return False


def content(object_key: bytes, partial_key: bytes | None) -> FileContent:
    return FileContent(1, 0, 1, object_key, partial_key)


def test_redirect() -> None:
    key, partial = bytes(range(100, 132)), bytes(range(32))
    assert redirect(content(key, None)) == b"/64/" + key.hex().encode()
    assert redirect(content(key, partial)) == b"/64/" + key.hex().encode()
    assert redirect(content(NO_KEY, partial)) == b"/00/p-" + partial.hex().encode()
    with pytest.raises(FormatError):
        redirect(content(NO_KEY, None))


@pytest.mark.root
def test_the_longest(tmp_path: Path) -> None:
    longest = {b"user." + b"n" * 250: b"v" * 65535, b"security.s": b"w" * 65535, b"user.e": b""}
    index = names(*((f"{n}", node(size=n, xattrs=longest)) for n in range(4)))
    image = build(index)
    with mounted(image, tmp_path) as root:
        assert read_tree(root, contents=False) == expected(index)
    check(image, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        b"system.other",
        b"user.",
        b"security.",
        b"btrfs.compression",
        b"user",
        b"system.nfs4_acl",
        b"",
    ],
)
def test_unknown_names(name: bytes) -> None:
    assert refused({name: b"v"})


def test_too_large() -> None:
    assert refused({b"user.a": bytes(65536)})
    assert not refused({b"user.%d" % n: bytes(65000) for n in range(4)})
    assert refused({b"user.%d" % n: bytes(65535) for n in range(4)})
    assert refused({b"user.%05d" % n: b"" for n in range(30_000)}, stat.S_IFDIR)


def test_names_with_zero_bytes() -> None:
    assert refused({b"user.a\0b": b""})


@pytest.mark.root
@pytest.mark.parametrize("name", GOOD_ACLS)
def test_access_control_lists(name: str, tmp_path: Path) -> None:
    """As they are set on a file system that can be written."""
    value = GOOD_ACLS[name]
    with filesystems.tmpfs(tmp_path / "tmpfs", "size=1m") as real:
        (real / "d").mkdir()
        os.setxattr(real / "d", ACCESS, value)  # becomes the mode if that can say it
        os.setxattr(real / "d", DEFAULT, value)
        assert os.getxattr(real / "d", DEFAULT) == value
    index = names(
        ("d", node(stat.S_IFDIR, 0o755, xattrs={ACCESS: value, DEFAULT: value})),
        ("f", node(size=9, xattrs={ACCESS: value, b"user.other": b"1"})),
        ("p", node(stat.S_IFIFO, xattrs={ACCESS: value})),
    )
    with mounted(build(index), tmp_path) as root:
        assert read_tree(root, contents=False) == expected(index)


@pytest.mark.root
@pytest.mark.parametrize("name", BAD_ACLS)
def test_what_is_no_access_control_list(name: str, tmp_path: Path) -> None:
    """Refused if, and only if, a file system that can be written refuses it."""
    with filesystems.tmpfs(tmp_path / "tmpfs", "size=1m") as real:
        (real / "d").mkdir()
        with pytest.raises(OSError, match=r"Invalid argument|not supported"):
            os.setxattr(real / "d", ACCESS, BAD_ACLS[name])
    assert refused({ACCESS: BAD_ACLS[name]})
    assert refused({DEFAULT: BAD_ACLS[name]}, stat.S_IFDIR)


def test_access_control_lists_of_symbolic_links() -> None:
    assert refused({ACCESS: GOOD_ACLS["minimal"]}, stat.S_IFLNK)
    assert not refused({b"security.x": b"v"}, stat.S_IFLNK)


def test_nothing_is_an_empty_list() -> None:
    """The kernel takes a list without entries for an order to remove the list."""
    assert refused({ACCESS: acl()})
    assert refused({ACCESS: b""})
