# SPDX-License-Identifier: Apache-2.0
"""Tar entries that are written as they are told: any bytes, any PAX record, nothing normalised.

By stdlib's tarfile alone. For the layers of images that are lazy, with their tables of contents, see
`tests.support.layers`, whose `LayerEntry` says what an entry means and not how it stands in the tar.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
from dataclasses import dataclass, field

SECOND = 10**9
DEFAULT_MTIME = 1_600_000_000 * SECOND


@dataclass(frozen=True)
class Entry:
    """A tar entry, written as it is told: nothing is normalised.

    Attributes:
        name: As it stands in the tar; bytes, as tar has no character set.
        kind: A type of `tarfile`.
        data: Content of a regular file.
        mode: Permission bits.
        uid: Owner.
        gid: Group.
        mtime: Nanoseconds since 1970; a PAX record if not whole seconds.
        target: Of a link.
        device: Major and minor number.
        xattrs: Become PAX records SCHILY.xattr.<name>.
        pax: Further PAX records.
    """

    name: bytes
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = DEFAULT_MTIME
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    pax: dict[str, str] = field(default_factory=dict)


def file(name: str | bytes, data: bytes = b"", **fields: object) -> Entry:
    """A regular file."""
    return Entry(_raw(name), data=data, **fields)  # type: ignore[arg-type]  # passed through


def folder(name: str | bytes, mode: int = 0o755, **fields: object) -> Entry:
    """A directory."""
    return Entry(_raw(name), tarfile.DIRTYPE, mode=mode, **fields)  # type: ignore[arg-type]  # same


def symlink(name: str | bytes, target: str | bytes, **fields: object) -> Entry:
    """A symbolic link."""
    return Entry(
        _raw(name),
        tarfile.SYMTYPE,
        mode=0o777,
        target=_raw(target),
        **fields,  # type: ignore[arg-type]  # same
    )


def hardlink(name: str | bytes, target: str | bytes, **fields: object) -> Entry:
    """A hard link to an earlier entry of the same tar."""
    return Entry(
        _raw(name),
        tarfile.LNKTYPE,
        target=_raw(target),
        **fields,  # type: ignore[arg-type]  # same
    )


def whiteout(name: str) -> Entry:
    """Deletes a name of lower layers."""
    head, tail = os.path.split(name)
    return file(os.path.join(head, f".wh.{tail}"), mode=0)


def opaque(name: str) -> Entry:
    """Hides what lower layers have in a directory."""
    return file(os.path.join(name, ".wh..wh..opq"), mode=0)


def capability(permitted: int, effective: bool = True) -> bytes:
    """The value of security.capability, revision 2 (linux/capability.h, struct vfs_cap_data)."""
    return struct.pack("<IIIII", 0x02000000 | effective, permitted, 0, 0, 0)


CAP_NET_RAW = 1 << 13


def add_entry(archive: tarfile.TarFile, entry: Entry) -> None:
    """Write one entry."""
    info = tarfile.TarInfo(_text(entry.name))
    info.type = entry.kind
    info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
    info.linkname = _text(entry.target)
    info.devmajor, info.devminor = entry.device
    info.size = len(entry.data)
    seconds, rest = divmod(entry.mtime, SECOND)
    info.mtime = seconds
    headers = {f"SCHILY.xattr.{key}": _text(value) for key, value in entry.xattrs.items()}
    if rest:
        headers["mtime"] = f"{seconds}.{rest:09d}"
    info.pax_headers = headers | entry.pax
    archive.addfile(info, io.BytesIO(entry.data))


def _raw(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
