# SPDX-License-Identifier: Apache-2.0
"""Extended attributes as EROFS stores them, and those by which overlayfs finds a file's bytes."""

from __future__ import annotations

import re
import struct
from binascii import hexlify
from collections.abc import Iterable

from lazysnap.erofs.layout import (
    MAX_XATTR_AREA,
    MAX_XATTR_NAME,
    MAX_XATTR_VALUE,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_UNIT,
)
from lazysnap.errors import FormatError
from lazysnap.index.model import NO_KEY, FileContent

# Linux Documentation/filesystems/overlayfs.rst, "Metadata only copy up" and "Data-only lower layers"
METACOPY = b"trusted.overlay.metacopy"
REDIRECT = b"trusted.overlay.redirect"
PARTIAL_PREFIX = b"p-"

_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
# EROFS_XATTR_INDEX_*; the name that is stored lacks the prefix, and an ACL has none left.
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))

# Linux include/uapi/linux/posix_acl_xattr.h: a version, then tag, permissions and id of each entry.
# The order of tags is what fs/posix_acl.c, posix_acl_valid, asks for: owner, users, owning group,
# groups, mask, others.
_ACL_VERSION = struct.pack("<I", 2)
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_TAGS = re.compile(rb"\x01(\x02*)\x04(\x08*)(\x10?)\x20", re.DOTALL)
_ACL_NAMED = (0x02, 0x08)
_NO_ID = 2**32 - 1


def redirect(content: FileContent) -> bytes:
    """Where the bytes of a file are in the data-only lower layers: the value of `REDIRECT`.

    `/`, two hexadecimal digits, `/`, and the name of the file there: the object key in hexadecimal,
    or, for a content that has none, `p-` and the partial key. The digits are the key's first two.

    Args:
        content: of a regular file that is not empty.

    Raises:
        FormatError: the content has no key at all.
    """
    return _target(content.object_key, content.partial_key)


def _target(object_key: bytes, partial_key: bytes | None) -> bytes:
    prefix, name = data_name(object_key, partial_key)
    return b"/" + name[:2] + b"/" + prefix + name


def data_name(object_key: bytes, partial_key: bytes | None) -> tuple[bytes, bytes]:
    """The name of a content in the data-only lower layers: a prefix, and the key in hexadecimal.

    Raises:
        FormatError: the content has no key at all.
    """
    if object_key != NO_KEY:
        return b"", hexlify(object_key)
    if partial_key is None:
        raise FormatError("layer index is damaged: a file without a key", reason="bad-index")
    return PARTIAL_PREFIX, hexlify(partial_key)


def data_marks(object_key: bytes, partial_key: bytes | None) -> bytes:
    """The encoded marks that send readers of a file to its bytes, for `area`.

    Raises:
        FormatError: the content has no key at all.
    """
    return encode_one(METACOPY, b"") + encode_one(REDIRECT, _target(object_key, partial_key))


def encode(xattrs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Extended attributes as the entries that follow the header.

    Args:
        xattrs: full names and values.

    Raises:
        FormatError: reason `xattr-not-storable`: EROFS cannot hold one, or the kernel would not
            hand it out as it is.
    """
    return b"".join([encode_one(name, value) for name, value in xattrs])


def encode_one(name: bytes, value: bytes) -> bytes:
    """One extended attribute, see `encode`."""
    index, rest = _split(name)
    if len(rest) > MAX_XATTR_NAME or len(value) > MAX_XATTR_VALUE or 0 in rest:
        raise not_storable(name, f"a name of {len(rest)} or a value of {len(value)} bytes")
    if not rest:
        _check_acl(name, value)
    entry = XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
    return entry + bytes(-len(entry) % XATTR_UNIT)


def area(entries: bytes) -> bytes:
    """What stands behind an inode: the header and the entries; nothing if there are none.

    Raises:
        FormatError: reason `xattr-not-storable`: they are too many.
    """
    if not entries:
        return b""
    if len(XATTR_HEADER) + len(entries) > MAX_XATTR_AREA:
        raise not_storable(b"", f"{len(entries)} bytes on one file")
    return XATTR_HEADER + entries


def check_symlink(xattrs: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse ACLs of a symbolic link: the kernel lists them and does not hand them out.

    Raises:
        FormatError: reason `xattr-not-storable`.
    """
    for name, _ in xattrs:
        if name in _ACLS:
            raise not_storable(name, "on a symbolic link")


def _check_acl(name: bytes, value: bytes) -> None:
    """Refuse an ACL that the kernel would not set: it would make the file unusable."""
    body = value[len(_ACL_VERSION) :]
    if value.startswith(_ACL_VERSION) and len(body) % _ACL_ENTRY.size == 0:
        entries = list(_ACL_ENTRY.iter_unpack(body))
        tags = bytes(min(tag, 0xFF) for tag, _, _ in entries)
        order = _ACL_TAGS.fullmatch(tags)
        if (
            order is not None
            and bool(order[3]) >= bool(order[1] or order[2])
            and all(permissions <= 7 for _, permissions, _ in entries)
            and not any(tag in _ACL_NAMED and owner == _NO_ID for tag, _, owner in entries)
        ):
            return
    raise not_storable(name, "not an access control list")


def not_storable(name: bytes, why: str) -> FormatError:
    """The error for an extended attribute that EROFS cannot hold."""
    return FormatError(
        f"EROFS cannot hold the extended attribute {name[:100]!r}: {why}",
        reason="xattr-not-storable",
    )


def _split(name: bytes) -> tuple[int, bytes]:
    """Index of the name's prefix, and what is behind it."""
    if name in _ACLS:
        return 2 + _ACLS.index(name), b""
    for prefix, index in _PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return index, name[len(prefix) :]
    raise not_storable(name, "unknown namespace")
