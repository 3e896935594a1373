# SPDX-License-Identifier: Apache-2.0
"""Odd images: what the formats and overlayfs allow and hardly anybody has, in all lazy forms.

`ODD` is the catalogue. `built(name)` gives an image in the cached registry (`fixtures.images`),
made by stdlib's tarfile and converted by ctr-remote and skopeo, so nothing of lazysnap takes part.
Every image starts with the same small base, which makes it runnable where busybox is installed.
"""

from __future__ import annotations

import inspect
import os
import struct
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from fixtures.images import catalogue, forms, oci

from .tar_entries import (
    CAP_NET_RAW,
    SECOND,
    Entry,
    add_entry,
    capability,
    file,
    folder,
    hardlink,
    opaque,
    symlink,
    whiteout,
)

Layers = Sequence[Callable[[], Iterator[Entry]]]


def base() -> Iterator[Entry]:
    """The lowest layer of every odd image."""
    yield from (folder(name) for name in ("bin", "etc", "proc", "sys", "dev", "root"))
    yield folder("tmp", 0o1777)
    busybox = Path("/bin/busybox")
    if busybox.exists():
        yield file("bin/busybox", busybox.read_bytes(), mode=0o755)
        yield from (symlink(f"bin/{name}", "busybox") for name in ("sh", "cat", "ls", "stat"))
    yield file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")


def _whiteouts_low() -> Iterator[Entry]:
    for name in ("kept", "gone", "again", "opaque", "deep/a/b"):
        for number in range(3):
            yield file(f"{name}/{number}", f"low {name} {number}".encode())
    yield file("one", b"low")
    yield symlink("link", "one")


def _whiteouts_high() -> Iterator[Entry]:
    yield folder("kept", mtime=1_500_000_000 * SECOND)
    yield whiteout("kept/1")
    yield whiteout("gone")
    yield whiteout("one")
    yield whiteout("link")
    yield folder("opaque", 0o700, uid=7, mtime=1_500_000_000 * SECOND)
    yield file("opaque/before", b"stands before the marker")
    yield opaque("opaque")
    yield file("opaque/1", b"high, behind the marker")
    yield whiteout("deep/a/b/2")
    yield whiteout("never/was/there")


def _whiteouts_top() -> Iterator[Entry]:
    yield file("gone", b"a file where a directory was")
    yield file("one", b"added again")
    yield folder("again/new")
    yield folder("kept")
    yield file("kept/1", b"added again")
    yield opaque("again/new")


def _parents_low() -> Iterator[Entry]:
    yield folder("a", 0o711, uid=11, gid=12, mtime=1_111_111_111 * SECOND, xattrs={"user.of": b"a"})
    yield folder("a/b", 0o2775, uid=13, gid=14, xattrs={"user.of": b"b", "user.more": b"\x00\xff"})
    yield file("a/b/low", b"low")
    yield folder("sticky", 0o1777, mtime=1_222_222_222 * SECOND)
    yield symlink("way", "a/b")


def _parents_high() -> Iterator[Entry]:
    yield file("a/b/c/high", b"parents a and a/b left out, c is new")
    yield file("sticky/high", b"parent left out")
    yield file("nowhere/at/all", b"no layer has the parents")


def _links() -> Iterator[Entry]:
    yield folder("x")
    yield folder("y/z", 0o700)
    yield file("x/first", b"linked", mode=0o640, uid=5)
    yield hardlink("y/z/second", "x/first", mode=0o640, uid=5)
    yield hardlink("third", "y/z/second", mode=0o640, uid=5)
    yield file("x/empty")
    yield hardlink("y/empty", "x/empty")
    yield symlink("x/symlink", "first")
    yield symlink("dangling", "no/such/file")
    yield symlink("absolute", "/x/first")
    yield symlink("long", "d/" * 1000 + "end")
    yield symlink("loop", "loop")
    yield symlink("up", "../../../../x", uid=3, gid=4, mtime=1_000_000_000 * SECOND)


def _links_differ() -> Iterator[Entry]:
    yield file("first", b"linked", mode=0o640, uid=5)
    yield hardlink("second", "first", mode=0o600, uid=6, mtime=1_000_000_000 * SECOND)


def _links_high() -> Iterator[Entry]:
    yield folder("x")
    yield file("x/first", b"replaced in a higher layer; the others keep the old content")


def _devices() -> Iterator[Entry]:
    yield folder("dev")
    yield Entry(b"dev/null", tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    yield Entry(b"dev/big", tarfile.CHRTYPE, mode=0o600, uid=1, device=(259, 70000))
    yield Entry(b"dev/sda", tarfile.BLKTYPE, mode=0o660, gid=6, device=(8, 0))
    yield Entry(b"dev/pipe", tarfile.FIFOTYPE, mode=0o620)


def _contents() -> Iterator[Entry]:
    yield file("empty")
    yield file("zeros", bytes(9 << 20))
    yield file("holes", b"start" + bytes(5 << 20) + b"middle" + bytes(70000) + b"end")
    yield file("exact", os.fsencode("x" * 4096) * 1024)  # just one 4 MiB chunk
    yield file("more", os.fsencode("y" * 4096) * 1024 + b"!")
    pattern = b"".join(
        struct.pack(">I", number * 2654435761 & 0xFFFFFFFF) for number in range(1 << 20)
    )
    yield file("pattern", pattern * 3)
    yield file("same", pattern * 3)


def _modes() -> Iterator[Entry]:
    yield file("setuid", b"#!/bin/sh\n", mode=0o4755)
    yield file("setgid", b"#!/bin/sh\n", mode=0o2755, gid=50)
    yield folder("sticky", 0o1777)
    yield folder("closed", 0)
    yield file("closed/file", b"x", mode=0)
    yield file("ids", b"x", uid=4_000_000_000, gid=3_999_999_999)
    yield file("nobody", b"x", uid=65534, gid=65534)
    yield file("ping", b"#!/bin/sh\n", mode=0o755,
               xattrs={"security.capability": capability(CAP_NET_RAW)})  # fmt: skip
    yield file("many", b"x", xattrs={f"user.{n:03}": bytes([n]) * n for n in range(1, 60)})
    yield file(
        "value", b"x", xattrs={"user.zero": b"a\x00b", "user.empty": b"", "user.utf": "ä".encode()}
    )
    yield folder("marked", xattrs={"user.on": b"directory"})


def _trusted() -> Iterator[Entry]:
    yield file("file", b"x", xattrs={"trusted.mine": b"1", "user.kept": b"2"})
    yield folder("folder", xattrs={"trusted.overlay.opaque": b"y"})
    yield file("folder/inside", b"x")


def _names() -> Iterator[Entry]:
    yield file("n" * 255, b"255 bytes")
    yield file("ä" * 127 + "x", b"255 bytes of UTF-8")
    yield folder("/".join(["d" * 200] * 10))
    yield file("/".join(["d" * 200] * 10) + "/deep", b"path of 2 kB")
    yield from (
        file(f"unicode/{name}", name.encode()) for name in ("ü", "u\u0308", "日本", "😀", "\u202e")
    )
    yield file("space in name", b"x")
    yield file("new\nline", b"x")
    yield file('quote"back\\slash', b"x")
    yield file("-rf", b"x")
    yield file("control\x01\x7f", b"x")
    yield symlink("to\u00e9", "unicode/ü")
    yield file("unicode/.wh", b"not a whiteout")
    yield file("unicode/wh.x", b"not a whiteout")


def _bytes_names() -> Iterator[Entry]:
    yield file(b"latin-\xe4", b"not UTF-8")
    yield folder(b"dir-\xff")
    yield file(b"dir-\xff/\xfe\xfd", b"not UTF-8")
    yield symlink(b"link-\xc0", b"latin-\xe4")


def _dotted_low() -> Iterator[Entry]:
    yield folder("./", 0o700, uid=9, mtime=1_300_000_000 * SECOND)
    yield folder("./a/", 0o750)
    yield file("./a/file", b"low")
    yield folder(".//b//c/")
    yield file("b/./c/dotted", b"x")
    yield hardlink("./linked", "./a/file")


def _dotted_high() -> Iterator[Entry]:
    yield folder("./", 0o711, gid=8)
    yield file("./a/file", b"high")
    yield file("./b/.wh.c", mode=0)


def _times() -> Iterator[Entry]:
    yield folder("t", mtime=1 * SECOND)
    yield file("t/epoch", b"x", mtime=0)
    yield file("t/y2040", b"x", mtime=2_208_988_800 * SECOND)
    yield file("t/nanoseconds", b"x", mtime=1_600_000_000 * SECOND + 123_456_789)
    yield file("t/half", b"x", mtime=1_600_000_000 * SECOND + 500_000_000)
    yield symlink("t/link", "epoch", mtime=5 * SECOND)
    yield folder("t/y2200", mtime=7_258_118_400 * SECOND)
    yield file("t/with-atime", b"x", pax={"atime": "1700000000.5"})


def _times_negative() -> Iterator[Entry]:
    yield file("before", b"x", mtime=-1_000_000_000 * SECOND + 1)


def _replaced_low() -> Iterator[Entry]:
    yield file("file-to-dir", b"low")
    yield file("dir-to-file/inside", b"low")
    yield file("dir-to-link/inside", b"low")
    yield symlink("link-to-dir", "dir-to-link")
    yield symlink("link-to-file", "file-to-dir")
    yield file("file-to-link", b"low")
    yield Entry(b"fifo-to-file", tarfile.FIFOTYPE)


def _replaced_high() -> Iterator[Entry]:
    yield folder("file-to-dir")
    yield file("file-to-dir/inside", b"high")
    yield file("dir-to-file", b"high")
    yield symlink("dir-to-link", "file-to-dir")
    yield folder("link-to-dir")
    yield file("link-to-dir/inside", b"high")
    yield file("link-to-file", b"high")
    yield symlink("file-to-link", "dir-to-file")
    yield file("fifo-to-file", b"high")


def _replaced_back() -> Iterator[Entry]:
    yield file("file-to-dir", b"a file again")
    yield folder("dir-to-file")
    yield file("dir-to-file/other", b"a directory again")


def _twice() -> Iterator[Entry]:
    yield file("file", b"first")
    yield folder("folder", 0o700)
    yield file("folder/a", b"a")
    yield folder("folder", 0o711, uid=3)
    yield file("file", b"second", mode=0o600)
    yield file("kind", b"file")
    yield folder("kind")


def _many() -> Iterator[Entry]:
    for number in range(100_000):
        if number % 250 == 0:
            yield folder(f"many/{number // 250:03}", mtime=(1_400_000_000 + number) * SECOND)
        yield file(
            f"many/{number // 250:03}/file-{number:06}",
            b"%d\n" % number * (number % 5),
            uid=number % 7,
            mtime=(1_400_000_000 + number) * SECOND,
        )


def _many_high() -> Iterator[Entry]:
    for number in range(0, 100_000, 1000):
        yield whiteout(f"many/{number // 250:03}/file-{number + 1:06}")
        yield file(f"many/{number // 250:03}/file-{number:06}", b"high")


ODD: dict[str, Layers] = {
    "whiteouts": (base, _whiteouts_low, _whiteouts_high, _whiteouts_top),
    "parents": (base, _parents_low, _parents_high),
    "links": (base, _links, _links_high),
    "links-differ": (base, _links_differ),
    "devices": (base, _devices),
    "contents": (base, _contents),
    "modes": (base, _modes),
    "trusted": (base, _trusted),
    "names": (base, _names),
    "bytes-names": (base, _bytes_names),
    "dotted": (base, _dotted_low, _dotted_high),
    "times": (base, _times),
    "times-negative": (base, _times_negative),
    "replaced": (base, _replaced_low, _replaced_high, _replaced_back),
    "twice": (base, _twice),
    "many": (base, _many, _many_high),
}


def write_layout(target: Path, layers: Layers) -> str:
    """Write layers as the image `plain` of an OCI layout; returns the manifest's digest."""
    written = [oci.write_layer(target, partial(_fill, make=make), level=1) for make in layers]
    return oci.write_image(target, "plain", written, {"Cmd": ["/bin/sh"]})


def built(name: str, wanted: Collection[str] = forms.ALL) -> catalogue.Built:
    """An odd image in the cached registry; made if its recipe (this source file) has changed.

    Args:
        name: A key of `ODD`.
        wanted: Its forms, see `fixtures.images.forms`.
    """
    layers = ODD[name]
    sources = [inspect.getsource(make) for make in layers]
    recipe = [*sources, inspect.getsource(add_entry), inspect.getsource(Entry)]
    return catalogue.stored(
        f"odd/{name}",
        recipe,
        lambda target: void(write_layout(target, layers)),
        wanted,
        say=lambda line: None,
    )


def void(_: object) -> None:
    """Drop a result."""


def _fill(archive: tarfile.TarFile, make: Callable[[], Iterator[Entry]]) -> None:
    for entry in make():
        add_entry(archive, entry)
