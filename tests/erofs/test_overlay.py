# SPDX-License-Identifier: Apache-2.0
"""The real use: images as lower layers of an overlay whose data-only lower layers hold the bytes.

Marked files are found in every image of several only with `metacopy=on`: without it, the kernel (6.18)
refuses to go on from one of them to lower layers that are not data-only (EPERM), so only the lowest
image's files can be seen.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lazysnap import mounts
from lazysnap.erofs.image import build
from lazysnap.erofs.xattrs import redirect
from lazysnap.index.model import NO_KEY
from tests.erofs.scene import mounted
from tests.support import layers
from tests.support.indexes import index_of, read
from tests.support.layers import LayerEntry, directory, file, hardlink, opaque, symlink, whiteout
from tests.support.tree import differences, read_tree, report

pytestmark = pytest.mark.root
_S = 10**9
# Since Linux 6.16, one image above data-only layers can be used with metacopy off.
_RELEASE = tuple(int(part) for part in os.uname().release.split(".", 2)[:2])
ONE_IMAGE = "" if _RELEASE >= (6, 16) else ",metacopy=on"

LOWER = [
    directory("kept", uid=7),
    *[file(f"kept/{n}", b"low %d" % n * n, mode=0o600 + n) for n in range(5)],
    directory("gone"),
    file("gone/file", b"x"),
    directory("hidden", mode=0o700),
    file("hidden/file", b"must not be seen"),
    file("large", bytes(range(256)) * 300, xattrs={"user.of": b"large"}),
    file("zeros", bytes(9000)),
    file("one", b"replaced"),
    file("sparse", b"begin" + bytes(40_000) + b"end"),
]
UPPER = [
    directory("kept", mode=0o711, mtime_ns=1_500_000_000 * _S),
    file("kept/2", b"upper"),
    hardlink("kept/3", "kept/2"),
    file("kept/empty", uid=3),
    whiteout("kept/1"),
    whiteout("gone"),
    directory("hidden", mode=0o755),
    opaque("hidden"),
    file("hidden/new", b"low 1"),
    symlink("one", "large"),
    LayerEntry("null", "char", mode=0o666, device=(1, 3)),
]


def without_digests(toc: dict[str, list[dict[str, str]]]) -> None:
    """Leave only digests of chunks, so that files of several chunks have no key but the partial one."""
    for entry in toc["entries"]:
        if entry["type"] == "reg":
            entry.pop("digest", None)


def unpack(entries: Sequence[LayerEntry], target: Path) -> None:
    """Unpack a layer by GNU tar, and make what overlay wants instead of markers."""
    target.mkdir()
    plain = [entry for entry in entries if "/.wh." not in "/" + entry.path]
    command = ["tar", "-x", "-p", "--xattrs", "--xattrs-include=*", "-C", str(target)]
    subprocess.run(command, input=layers.make_tar(plain), check=True)
    for entry in entries:
        head, marker, name = entry.path.rpartition(".wh.")
        if name == ".opq":
            os.setxattr(target / head.removesuffix(".wh."), "trusted.overlay.opaque", b"y")
        elif marker:
            os.mknod(target / head / name, stat.S_IFCHR, 0)
    for entry in entries:
        if entry.type == "dir":
            os.utime(target / entry.path, ns=(entry.mtime_ns, entry.mtime_ns))
    os.utime(target, ns=(0, 0))


@contextlib.contextmanager
def overlay(target: Path, options: str, flags: int = 0) -> Iterator[Path]:
    """Mount an overlay."""
    target.mkdir()
    mounts.mount("overlay", str(target), "overlay", flags, options)
    try:
        yield target
    finally:
        mounts.unmount(str(target), lazy=False)


@contextlib.contextmanager
def images(target: Path) -> Iterator[str]:
    """Mount the layers, one by whole digests and one by digests of chunks, and store their files.

    Yields:
        The option lowerdir.
    """
    objects, partial = target / "objects", target / "partial"
    written = [
        layers.estargz(UPPER, chunk_size=1000),
        layers.zstd_chunked(LOWER, chunk_size=1000, edit=without_digests),
    ]
    roots = []
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(written):
            index = index_of(layer)
            roots.append(stack.enter_context(mounted(build(index), target / f"{number}")))
            for chunk in range(index.chunk_count):
                node = index.owner(chunk)
                content = index.file(node)
                unknown = content.object_key == NO_KEY
                place = (partial if unknown else objects) / os.fsdecode(redirect(content))[1:]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(read(index, layer.blob, node))
        assert objects.is_dir()
        assert partial.is_dir()
        yield ":".join(map(str, roots)) + f"::{objects}::{partial}"


def test_every_byte(tmp_path: Path) -> None:
    """Against what GNU tar unpacked."""
    for name, entries in (("lower", LOWER), ("upper", UPPER)):
        unpack(entries, tmp_path / name)
    plain = f"{tmp_path}/upper:{tmp_path}/lower"
    with (
        images(tmp_path) as lower,
        overlay(tmp_path / "here", f"lowerdir={lower},metacopy=on", mounts.MS_RDONLY) as here,
        overlay(tmp_path / "there", f"lowerdir={plain}", mounts.MS_RDONLY) as there,
    ):
        found = differences(read_tree(there), read_tree(here))
        assert not found, report(found)


def test_an_overlay_above_leaves_no_marks_where_it_writes(tmp_path: Path) -> None:
    """With an upper directory, `metacopy=on` would fill it with files without data."""
    upper, work = tmp_path / "upper", tmp_path / "work"
    upper.mkdir()
    work.mkdir()
    with (
        images(tmp_path) as lower,
        overlay(tmp_path / "image", f"lowerdir={lower},metacopy=on", mounts.MS_RDONLY) as image,
        overlay(tmp_path / "all", f"lowerdir={image},upperdir={upper},workdir={work}") as here,
    ):
        os.chmod(here / "large", 0o700)
        with (here / "kept/2").open("ab") as file:
            file.write(b", more")
        assert (here / "kept/2").read_bytes() == b"upper, more"
        assert sorted(os.listdir(here / "hidden")) == ["new"]
    assert (upper / "large").read_bytes() == bytes(range(256)) * 300
    assert "trusted.overlay.metacopy" not in os.listxattr(upper / "large")
    assert "trusted.overlay.redirect" not in os.listxattr(upper / "large")


def test_what_is_not_there_is_an_error_and_no_empty_file(tmp_path: Path) -> None:
    index = index_of(layers.estargz([file("f", b"data"), file("empty")]))
    (tmp_path / "objects").mkdir()
    with (
        mounted(build(index), tmp_path) as root,
        overlay(tmp_path / "here", f"lowerdir={root}::{tmp_path}/objects{ONE_IMAGE}") as here,
    ):
        assert (here / "empty").read_bytes() == b""
        assert (here / "f").stat().st_size == 4
        with pytest.raises(OSError, match=r"No such file|error"):
            (here / "f").read_bytes()
