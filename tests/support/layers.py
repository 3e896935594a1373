# SPDX-License-Identifier: Apache-2.0
"""Writes small layers in all lazy formats, from a list of tar entries; for tests only.

An independent reading of the public format descriptions (stargz-snapshotter docs/estargz.md,
containers/storage docs/containers-storage-zstd-chunked.md): it shares no code with
lazysnap/formats. Every blob also is a valid gzip or zstd tar, so `tarfile` is the oracle of what it
holds. Simple and slow; not for production.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import zstandard

TAR = "application/vnd.oci.image.layer.v1.tar"
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
STARGZ_PREFIX = "io.containers.zstd-chunked."
CONTAINERS_PREFIX = "io.github.containers.zstd-chunked."
SKIPPABLE = b"\x50\x2a\x4d\x18"


@dataclass
class LayerEntry:
    """One tar entry; `type` is a word of the TOC (dir, reg, symlink, hardlink, char, block, fifo)."""

    path: str
    type: str = "reg"
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1_600_000_000 * 10**9
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def file(path: str, data: bytes = b"", **fields: Any) -> LayerEntry:
    return LayerEntry(path, "reg", data, **fields)


def directory(path: str, **fields: Any) -> LayerEntry:
    return LayerEntry(path, "dir", **{"mode": 0o755, **fields})


def symlink(path: str, target: str, **fields: Any) -> LayerEntry:
    return LayerEntry(path, "symlink", link=target, **{"mode": 0o777, **fields})


def hardlink(path: str, target: str, **fields: Any) -> LayerEntry:
    return LayerEntry(path, "hardlink", link=target, **fields)


def whiteout(path: str) -> LayerEntry:
    """The marker that deletes `path` of lower layers."""
    head, slash, base = path.rpartition("/")
    return LayerEntry(head + slash + ".wh." + base)


def opaque(path: str) -> LayerEntry:
    """The marker that hides what lower layers have in the directory `path`."""
    return LayerEntry((path.rstrip("/") + "/" if path else "") + ".wh..wh..opq")


_TAR_TYPES = {
    "dir": tarfile.DIRTYPE,
    "reg": tarfile.REGTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}
_TOC_TYPES = {v: k for k, v in _TAR_TYPES.items()}


def make_tar(entries: Iterable[LayerEntry]) -> bytes:
    """The entries as an uncompressed PAX tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.path)
            info.type = _TAR_TYPES[entry.type]
            info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
            info.linkname = entry.link
            info.devmajor, info.devminor = entry.device
            info.mtime, fraction = divmod(entry.mtime_ns, 10**9)
            info.size = len(entry.data)
            pax: dict[str, str] = {}
            if fraction:
                pax["mtime"] = f"{info.mtime}.{fraction:09d}"
            for name, value in entry.xattrs.items():
                # tarfile writes PAX values as text, so the bytes go in disguised.
                pax["SCHILY.xattr." + name] = value.decode("utf-8", "surrogateescape")
            info.pax_headers = pax
            tar.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


@dataclass
class Layer:
    """A written layer and what a manifest would say of it."""

    blob: bytes
    media_type: str
    annotations: dict[str, str]
    tar: bytes  # the source
    toc: bytes = b""  # uncompressed JSON
    toc_offset: int = 0  # of the compressed TOC

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.blob).hexdigest()

    @property
    def size(self) -> int:
        return len(self.blob)

    @property
    def toc_digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.toc).hexdigest()

    @property
    def uncompressed(self) -> bytes:
        """What a plain decompressor makes of the blob: the bytes under the diff id."""
        if self.media_type.endswith("zstd"):
            reader = zstandard.ZstdDecompressor().stream_reader(self.blob, read_across_frames=True)
            return bytes(reader.read())
        if not self.media_type.endswith("gzip"):
            return self.blob
        # Not gzip.decompress, which copies what is left at each of many members.
        with gzip.open(io.BytesIO(self.blob)) as file:
            return file.read()

    @property
    def diff_id(self) -> str:
        return "sha256:" + hashlib.sha256(self.uncompressed).hexdigest()

    @property
    def descriptor(self) -> dict[str, Any]:
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
            "annotations": self.annotations,
        }


def plain(source: Iterable[LayerEntry] | bytes, compression: str = "gzip") -> Layer:
    """An ordinary layer without a TOC; compression is gzip, zstd or the empty string."""
    tar = _tar(source)
    packers: dict[str, Callable[[bytes], bytes]] = {"gzip": _gzip, "zstd": _zstd, "": bytes}
    blob = packers[compression](tar)
    return Layer(blob, f"{TAR}+{compression}".rstrip("+"), {}, tar)


def estargz(
    source: Iterable[LayerEntry] | bytes,
    *,
    chunk_size: int = 4 << 20,
    min_chunk_size: int = 0,
    prioritized: Sequence[str] | None = None,
    legacy: bool = False,
    edit: Any = None,
) -> Layer:
    """An eStargz layer.

    Args:
        source: entries, or a tar.
        chunk_size: longest chunk in bytes.
        min_chunk_size: a member takes more payloads until it holds this many uncompressed bytes.
        prioritized: names of files to put before the landmark; None writes no landmark at all,
            an empty sequence writes the one that says "nothing to prefetch".
        legacy: write stargz: another footer, no chunk digests.
        edit: called with the TOC (a dict) before it is written; may change it.
    """
    source_tar = _tar(source)
    tar = _with_landmark(source_tar, prioritized)
    body = _Body(tar, _gzip, chunk_size, min_chunk_size)
    toc = {"version": 1, "entries": body.entries}
    if legacy:
        for entry in body.entries:
            entry.pop("chunkDigest", None)
            entry.pop("digest", None)
    layer = finish_estargz(body.out, _edited(toc, edit), source_tar, legacy=legacy)
    if not legacy:
        layer.annotations[UNCOMPRESSED_SIZE] = str(len(layer.uncompressed))
    return layer


def finish_estargz(data: bytes, toc: bytes, tar: bytes = b"", *, legacy: bool = False) -> Layer:
    """`data` followed by the TOC member and the footer."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as out:
        info = tarfile.TarInfo("stargz.index.json")
        info.size = len(toc)
        out.addfile(info, io.BytesIO(toc))
    blob = data + _gzip(packed.getvalue()) + estargz_footer(len(data), legacy=legacy)
    layer = Layer(blob, TAR + "+gzip", {}, tar, toc, len(data))
    if not legacy:
        layer.annotations = {TOC_DIGEST: layer.toc_digest}
    return layer


def estargz_footer(toc_offset: int, *, legacy: bool = False) -> bytes:
    payload = b"%016xSTARGZ" % toc_offset
    extra = payload if legacy else b"SG" + struct.pack("<H", len(payload)) + payload
    head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra
    return head + b"\x01\0\0\xff\xff" + bytes(8)


def zstd_chunked(
    source: Iterable[LayerEntry] | bytes,
    *,
    dialect: str = "stargz",
    footer: int | None = None,
    chunk_size: int = 4 << 20,
    min_chunk_size: int = 0,
    prioritized: Sequence[str] | None = None,
    edit: Any = None,
) -> Layer:
    """A zstd:chunked layer.

    Args:
        source: entries, or a tar.
        dialect: "stargz" (stargz-snapshotter, nerdctl) or "containers" (podman, buildah, skopeo).
        footer: bytes of footer payload: 40, 56 or 64; the default is the dialect's newest.
        chunk_size: longest chunk in bytes.
        min_chunk_size: as in `estargz`; dialect stargz only.
        prioritized: as in `estargz`; dialect stargz only.
        edit: as in `estargz`.
    """
    source_tar = _tar(source)
    containers = dialect == "containers"
    tar = source_tar if containers else _with_landmark(source_tar, prioritized)
    body = _Body(tar, _zstd, chunk_size, min_chunk_size, containers=containers)
    tail = bytes(1024)  # the end of the tar belongs to the data here
    toc: dict[str, Any] = {"version": 1, "entries": body.entries}
    split = _zstd(b"tar-split is not read by anyone here\n") if containers else b""
    if containers:
        toc["tarSplitDigest"] = "sha256:" + hashlib.sha256(split).hexdigest()
    layer = finish_zstd_chunked(
        body.out + _zstd(tail),
        _edited(toc, edit),
        source_tar,
        footer=footer or (64 if containers else 40),
        split=split,
        containers=containers,
    )
    if not containers:
        layer.annotations[UNCOMPRESSED_SIZE] = str(len(layer.uncompressed))
    return layer


def finish_zstd_chunked(
    data: bytes,
    toc: bytes,
    tar: bytes = b"",
    *,
    footer: int = 40,
    split: bytes = b"",
    containers: bool = False,
) -> Layer:
    """`data` followed by the TOC frame, perhaps a tar-split frame, and the footer."""
    frame = _zstd(toc)
    offset = len(data) + 8
    blob = data + _skippable(frame)
    split_offset = len(blob) + 8
    if split:
        blob += _skippable(split)
    fields = struct.pack("<4Q", offset, len(frame), len(toc), 1)
    if footer == 40:
        payload = fields + b"GnUlInUx"
    elif footer == 56:
        payload = fields + b"GnUlInUx" + bytes(16)
    else:
        payload = fields + struct.pack("<3Q", split_offset, len(split), 36) + b"GNUlInUx"
    layer = Layer(blob + _skippable(payload), TAR + "+zstd", {}, tar, toc, offset)
    prefix = CONTAINERS_PREFIX if containers else STARGZ_PREFIX
    layer.annotations = {
        prefix + "manifest-checksum": "sha256:" + hashlib.sha256(frame).hexdigest(),
        prefix + "manifest-position": f"{offset}:{len(frame)}:{len(toc)}:1",
    }
    if containers:
        layer.annotations[prefix + "tarsplit-position"] = f"{split_offset}:{len(split)}:36"
    else:
        layer.annotations[TOC_DIGEST] = layer.toc_digest
    return layer


def _tar(source: Iterable[LayerEntry] | bytes) -> bytes:
    return source if isinstance(source, bytes) else make_tar(source)


def _edited(toc: dict[str, Any], edit: Any) -> bytes:
    if edit is not None:
        edit(toc)
    return json.dumps(toc, indent="\t", ensure_ascii=False).encode()


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def _skippable(payload: bytes) -> bytes:
    return SKIPPABLE + struct.pack("<I", len(payload)) + payload


def _with_landmark(tar: bytes, prioritized: Sequence[str] | None) -> bytes:
    """The tar with the prioritized files first, then the landmark, then the others."""
    if prioritized is None:
        return tar
    first: list[bytes] = []
    others: list[bytes] = []
    for info, raw in _split(tar):
        clean = "/" + info.name.removeprefix("./").strip("/")
        ahead = any(("/" + p.strip("/") + "/").startswith(clean + "/") for p in prioritized)
        (first if ahead else others).append(raw)
    name = ".prefetch.landmark" if prioritized else ".no.prefetch.landmark"
    landmark = make_tar([file(name, b"\x0f")])[:1024]
    return b"".join([*first, landmark, *others]) + bytes(1024)


def _split(tar: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Each member with its raw bytes: PAX headers, header, payload, padding."""
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        members = archive.getmembers()
    parts, start = [], 0
    for info in members:
        payload = info.size if info.isreg() else 0
        end = info.offset_data + (payload + 511) // 512 * 512
        parts.append((info, tar[start:end]))
        start = end
    return parts


class _Body:
    """The compressed members of a layer, and the TOC entries that point into them."""

    def __init__(
        self, tar: bytes, pack: Any, chunk_size: int, min_chunk_size: int, containers: bool = False
    ) -> None:
        self.pack = pack
        self.chunk_size = chunk_size
        self.min_chunk_size = min_chunk_size
        self.containers = containers
        self.entries: list[dict[str, Any]] = []
        self.pending = b""  # uncompressed bytes of the member being filled
        self.done: list[bytes] = []
        self.length = 0
        self.fresh = False  # whether the pending member begins with a payload
        for info, raw in _split(tar):
            self._add(info, raw)
        self._flush()
        self.out = b"".join(self.done)

    def _flush(self) -> None:
        if self.pending:
            self.done.append(self.pack(self.pending))
            self.length += len(self.done[-1])
            self.pending = b""
        self.fresh = False

    def _begin(self, *, own_member: bool) -> tuple[int, int]:
        """Where the next payload goes: (blob offset, offset in the member)."""
        if own_member or not self.fresh or len(self.pending) >= self.min_chunk_size:
            self._flush()
            self.fresh = True
        return self.length, len(self.pending)

    def _add(self, info: tarfile.TarInfo, raw: bytes) -> None:
        entry = self._entry(info)
        self.entries.append(entry)
        if not info.isreg() or not info.size:
            self.pending += raw
            return
        header = len(raw) - (info.size + 511) // 512 * 512
        data = raw[header : header + info.size]
        entry["digest"] = "sha256:" + hashlib.sha256(data).hexdigest()
        self.pending += raw[:header]
        landmark = info.name in (".prefetch.landmark", ".no.prefetch.landmark")
        pieces = [data[i : i + self.chunk_size] for i in range(0, len(data), self.chunk_size)]
        position = 0
        for number, piece in enumerate(pieces):
            target = entry
            if number:
                target = {"name": info.name, "type": "chunk"}
                self.entries.append(target)
            offset, inner = self._begin(own_member=landmark)
            self.pending += piece
            self._describe(target, piece, offset, inner, position, last=number == len(pieces) - 1)
            position += len(piece)
            if self.containers:
                self._flush()
        if self.containers:
            entry["endOffset"] = self.length
            if len(pieces) == 1:
                for key in ("chunkSize", "chunkDigest", "chunkOffset"):
                    entry.pop(key, None)
        if landmark:
            self._flush()
        self.pending += raw[header + info.size :]

    def _describe(
        self, entry: dict[str, Any], piece: bytes, offset: int, inner: int, at: int, *, last: bool
    ) -> None:
        if offset:
            entry["offset"] = offset
        if inner:
            entry["innerOffset"] = inner
        if at:
            entry["chunkOffset"] = at
        if not last or len(piece) == self.chunk_size or self.containers:
            entry["chunkSize"] = len(piece)
        entry["chunkDigest"] = "sha256:" + hashlib.sha256(piece).hexdigest()
        if self.containers and len(piece) >= 1024 and not any(piece):
            entry["chunkType"] = "zeros"

    def _entry(self, info: tarfile.TarInfo) -> dict[str, Any]:
        name = info.name + ("/" if info.isdir() and not self.containers else "")
        entry: dict[str, Any] = {"name": name, "type": _TOC_TYPES[info.type]}
        numbers = {"size": info.size, "mode": info.mode, "uid": info.uid, "gid": info.gid}
        entry |= {k: v for k, v in numbers.items() if v}
        stamp = info.pax_headers.get("mtime", str(int(info.mtime)))
        seconds, _, fraction = stamp.partition(".")
        moment = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
        entry["modtime"] = moment.strftime("%Y-%m-%dT%H:%M:%S")
        if fraction and self.containers:
            entry["modtime"] += "." + fraction
        entry["modtime"] += "Z"
        if info.linkname:
            entry["linkName"] = info.linkname
        if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            entry |= {"devMajor": info.devmajor, "devMinor": info.devminor}
        xattrs = {
            key.removeprefix("SCHILY.xattr."): base64.b64encode(
                value.encode("utf-8", "surrogateescape")
            ).decode()
            for key, value in info.pax_headers.items()
            if key.startswith("SCHILY.xattr.")
        }
        if xattrs:
            entry["xattrs"] = xattrs
        if info.isreg():
            if not self.containers:
                entry["digest"] = "sha256:" + hashlib.sha256(b"").hexdigest()
        else:
            entry.pop("size", None)
        return entry
