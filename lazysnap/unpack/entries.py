# SPDX-License-Identifier: Apache-2.0
"""The entries of a tar, one after the other: headers put together with what stands before them.

Knows nothing of layers: whiteouts are files here. The meaning of a header is decided as Go's
archive/tar does, see `lazysnap.formats.tar`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lazysnap.errors import FormatError
from lazysnap.formats import tar
from lazysnap.formats.tar import Pieces
from lazysnap.unpack.root import show
from lazysnap.unpack.stream import TarStream

_MAX_RECORDS = 1 << 20
"""Bytes of one extended header or long name, as in Go's archive/tar."""
_XATTR = b"SCHILY.xattr."
_LATEST_NS = (1 << 63) - 1
_MAX_MAJOR, _MAX_MINOR = 0xFFF, 0xFFFFF
_FILES = frozenset({tar.FILE, tar.OLD_FILE, tar.CONTIGUOUS, tar.GNU_SPARSE})


@dataclass(slots=True)
class Entry:
    """One file of a tar.

    Attributes:
        name: as it stands there.
        kind: `FILE`, `HARD_LINK`, `SYMLINK`, `CHAR`, `BLOCK_DEVICE`, `DIRECTORY` or `FIFO`.
        mode: permissions.
        uid, gid: owner.
        atime_ns, mtime_ns: since 1970.
        size: of a regular file, in bytes, with its holes.
        link: target of a link.
        device: major and minor number.
        xattrs: names and values, as they stand there.
        pieces: of a sparse file, which data are stored; None for all others.
    """

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    size: int
    link: bytes
    device: tuple[int, int]
    xattrs: list[tuple[bytes, bytes]]
    pieces: Pieces | None = None


class Entries:
    """Reads entries; what an entry's user leaves of its data is passed over.

    Args:
        stream: at its beginning.

    """

    def __init__(self, stream: TarStream) -> None:
        self._stream = stream
        self._data_end = 0
        self._name = b""
        self._between = False

    @property
    def where(self) -> str:
        """Which entry is being read, for messages; empty before the first."""
        if not self._name:
            return ""
        return ("behind entry " if self._between else "entry ") + show(self._name)

    def next(self) -> Entry | None:
        """The next entry, at whose data the stream stands then; None at the end.

        Raises:
            FormatError: the tar is malformed.
        """
        stream = self._stream
        self._between = True
        records: list[tuple[bytes, bytes]] = []
        long_name = long_link = None
        while True:
            if stream.position < self._data_end:
                stream.skip(self._data_end - stream.position)
            block = stream.read(tar.BLOCK)
            header = tar.parse_header(block) if block else None
            if header is None:
                if block and stream.read(tar.BLOCK).strip(b"\0"):
                    raise FormatError("a single block of zeros within the tar")
                return None
            kind = header.kind
            if kind == tar.PAX:
                records = tar.parse_pax(self._whole(header.size))
            elif kind == tar.GNU_NAME:
                long_name = self._whole(header.size).partition(b"\0")[0]
            elif kind == tar.GNU_LINK:
                long_link = self._whole(header.size).partition(b"\0")[0]
            elif kind == tar.PAX_GLOBAL:
                self._data_end = stream.position + _padded(header.size)
            else:
                return self._entry(block, header, records, (long_name, long_link))

    def _whole(self, size: int) -> bytes:
        if size > _MAX_RECORDS:
            raise FormatError(f"an extended header of {size} bytes")
        data = self._stream.read(size) if size else b""
        if len(data) < size:
            raise FormatError("the tar is cut off")
        self._data_end = self._stream.position + -size % tar.BLOCK
        return data

    def _entry(
        self,
        block: bytes,
        header: tar.Header,
        records: list[tuple[bytes, bytes]],
        long: tuple[bytes | None, bytes | None],
    ) -> Entry:
        mtime = header.mtime * 10**9
        entry = Entry(
            name=header.name if long[0] is None else long[0],
            kind=header.kind,
            mode=header.mode & 0o7777,
            uid=header.uid,
            gid=header.gid,
            atime_ns=mtime,
            mtime_ns=mtime,
            size=header.size,
            link=header.link if long[1] is None else long[1],
            device=header.device,
            xattrs=[],
        )
        if records:
            _merge(entry, records)
        self._name, self._between = entry.name, False
        entry.uid, entry.gid = _owner(entry.uid), _owner(entry.gid)
        _check_times(entry)
        self._place(entry, block, records)
        return entry

    def _place(self, entry: Entry, block: bytes, records: list[tuple[bytes, bytes]]) -> None:
        """Find the entry's data, and its pieces if it is sparse."""
        stored = entry.size
        if entry.kind in tar.WITHOUT_DATA:
            stored = entry.size = 0
        self._data_end = self._stream.position + _padded(stored)
        if entry.kind == tar.GNU_SPARSE:
            entry.pieces, entry.size, more = tar.gnu_sparse_head(block)
            while more:
                found, more = tar.gnu_sparse_more(self._block())
                entry.pieces += found
                if len(entry.pieces) > tar.MAX_SPARSE_PIECES:
                    raise FormatError("a sparse file of too many pieces")
                self._data_end += tar.BLOCK  # they do not count as the file's data
        elif entry.kind in _FILES and records:
            stored = self._pax_sparse(entry, dict(records), records, stored)
        if entry.pieces is not None:
            tar.check_sparse(entry.pieces, stored, entry.size)
        if entry.kind in _FILES:
            entry.kind = tar.FILE
        elif entry.kind not in tar.WITHOUT_DATA:
            raise FormatError(f"an entry of the unknown type {entry.kind!r}")
        if entry.kind in (tar.CHAR, tar.BLOCK_DEVICE) and not (
            0 <= entry.device[0] <= _MAX_MAJOR and 0 <= entry.device[1] <= _MAX_MINOR
        ):
            raise FormatError(f"a device with the impossible number {entry.device}")
        if b"\0" in entry.name or b"\0" in entry.link:
            raise FormatError("a name with a zero byte")

    def _pax_sparse(
        self,
        entry: Entry,
        last: dict[bytes, bytes],
        records: list[tuple[bytes, bytes]],
        stored: int,
    ) -> int:
        """Take over a map in PAX form; returns how many bytes of the file's own data follow."""
        if last.get(b"GNU.sparse.major") == b"1" and last.get(b"GNU.sparse.minor") == b"0":
            before, text = self._stream.position, tar.SparseText()
            while entry.pieces is None:
                if self._stream.position + tar.BLOCK > self._data_end:
                    raise FormatError("the map of a sparse file is cut off")
                entry.pieces = text.feed(self._block())
            stored -= self._stream.position - before
        else:
            entry.pieces = tar.pax_sparse(records)
            if entry.pieces is None:
                return stored
        size = last.get(b"GNU.sparse.realsize") or last.get(b"GNU.sparse.size")
        if size is None:
            raise FormatError("a sparse file without its size")
        entry.size = tar.decimal(size, "GNU.sparse.size")
        entry.name = last.get(b"GNU.sparse.name") or entry.name
        self._name = entry.name
        return stored

    def _block(self) -> bytes:
        block = self._stream.read(tar.BLOCK)
        if not block:
            raise FormatError("the tar is cut off")
        return block


def _padded(size: int) -> int:
    return size + -size % tar.BLOCK


def _merge(entry: Entry, records: list[tuple[bytes, bytes]]) -> None:
    """Let PAX records override the header. An empty one leaves it as it is, as in Go."""
    atime = None
    for key, value in records:
        if key.startswith(_XATTR):
            name = key[len(_XATTR) :]
            entry.xattrs = [each for each in entry.xattrs if each[0] != name]
            entry.xattrs.append((name, value))
        elif not value:
            continue
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.size = tar.decimal(value, "size")
            if entry.size < 0:
                raise FormatError("a tar entry of negative size")
        elif key == b"uid":
            entry.uid = tar.decimal(value, "uid")
        elif key == b"gid":
            entry.gid = tar.decimal(value, "gid")
        elif key == b"mtime":
            entry.mtime_ns = tar.nanoseconds(value, "mtime")
        elif key == b"atime":
            atime = tar.nanoseconds(value, "atime")
    entry.atime_ns = entry.mtime_ns if atime is None else atime


def _owner(number: int) -> int:
    # Old writers give -2 for nobody; -1 would mean to leave the owner as it is.
    if not -(1 << 31) <= number < (1 << 32) - 1 or number == -1:
        raise FormatError(f"an owner with the impossible number {number}")
    return number & 0xFFFFFFFF


def _check_times(entry: Entry) -> None:
    """Set times as containerd does: the later one as atime, 1970 for what does not fit."""
    latest = max(entry.atime_ns, entry.mtime_ns)
    entry.atime_ns = latest if 0 <= latest <= _LATEST_NS else 0
    if not 0 <= entry.mtime_ns <= _LATEST_NS:
        entry.mtime_ns = 0
