# SPDX-License-Identifier: Apache-2.0
"""What a mounted layer looks like, through the kernel."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shard.scene import Shard, shard
from tests.support import layers
from tests.support.layers import LayerEntry

pytestmark = [pytest.mark.root, pytest.mark.fuse]

# struct vfs_ns_cap_data (linux/capability.h): version 2 with the effective flag, cap_net_raw.
_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
_KINDS = dict(zip((b"0", b"2", b"3", b"4", b"5", b"6"), "flcbdp", strict=True))
_BIG = os.urandom(300_000)
ENTRIES = [
    layers.directory("d", mode=0o1777, uid=3, gid=4, mtime_ns=1_234_567_890 * 10**9),
    layers.file("d/file", b"content", mode=0o4755, uid=1000, gid=70_000),
    # As an unpack gives the link's attributes to both names.
    layers.hardlink("d/same", "d/file", mode=0o4755, uid=1000, gid=70_000),
    layers.symlink("d/link", "../nowhere"),
    layers.file("d/empty"),
    layers.file("d/capable", b"x", mode=0o755, xattrs={"security.capability": _NET_RAW}),
    layers.file("d/marked", b"x", xattrs={"user.mark": b"\0value", "user.empty": b""}),
    LayerEntry("d/fifo", "fifo", mode=0o600),
    LayerEntry("d/char", "char", device=(1, 3), mode=0o666),
    LayerEntry("d/block", "block", device=(7, 300)),
    layers.file("big", _BIG),
    layers.directory("many"),
    *(layers.file(f"many/{n:05}", b"x") for n in range(20_000)),
    layers.directory("hidden"),
    layers.opaque("hidden"),
    layers.file("hidden/new", b"n"),
    layers.whiteout("gone"),
    layers.file("nam\u00e9 with \u2603 and \n", b"u"),
    layers.file("implied/parents/file", b"i"),
]


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    with shard(tmp_path_factory.mktemp("tree")) as it:
        yield it


@pytest.fixture(scope="module")
def tree(it: Shard) -> Path:
    return it.attach(layers.estargz(ENTRIES, chunk_size=50_000))


def test_find_sees_what_the_tar_holds(tree: Path) -> None:
    command = ["find", str(tree), "-printf", r"%P\0%y\0%#m\0%U\0%G\0%T@\0->%l\0\0\0"]
    output = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    records = (record.split("\0") for record in output.split("\0\0\0")[:-1])
    found = {path: fields for path, *fields in records}
    expected = set()
    with tarfile.open(fileobj=io.BytesIO(layers.make_tar(ENTRIES))) as tar:
        for info in tar:
            if "/.wh." in "/" + info.name:
                continue
            expected.add(info.name)
            kind, mode, uid, gid, mtime, link = found[info.name]
            if info.islnk():
                info = tar.getmember(info.linkname)
            assert kind == _KINDS[info.type]
            assert (int(mode, 8), int(uid), int(gid)) == (info.mode, info.uid, info.gid), info.name
            assert float(mtime) == info.mtime
            assert link == "->" + (info.linkname if info.issym() else "")
    assert set(found) - expected == {"", "gone", "implied", "implied/parents"}


def test_large_directories_are_listed_once_each(tree: Path) -> None:
    names = os.listdir(tree / "many")
    assert len(names) == 20_000
    assert set(names) == {f"{n:05}" for n in range(20_000)}


def test_bytes_and_short_reads_at_the_end(tree: Path) -> None:
    fd = os.open(tree / "big", os.O_RDONLY)
    try:
        assert os.pread(fd, 1 << 20, 0) == _BIG
        assert os.pread(fd, 1000, 299_990) == _BIG[299_990:]
        assert os.pread(fd, 10, 300_000) == b""
        assert os.pread(fd, 10, 1 << 40) == b""
    finally:
        os.close(fd)
    assert (tree / "d/empty").read_bytes() == b""


def test_hard_links_devices_and_names(tree: Path) -> None:
    one, other = (tree / "d/file").stat(), (tree / "d/same").stat()
    assert (one.st_ino, one.st_nlink) == (other.st_ino, 2)
    assert (tree / "d/same").read_bytes() == b"content"
    assert (tree / "d/char").lstat().st_rdev == os.makedev(1, 3)
    assert (tree / "d/block").lstat().st_rdev == os.makedev(7, 300)
    assert stat.S_ISFIFO((tree / "d/fifo").lstat().st_mode)
    assert (tree / "nam\u00e9 with \u2603 and \n").read_bytes() == b"u"
    assert (tree / "gone").lstat().st_rdev == 0
    # A device of the layer is one that works: nothing forces nodev on the mount.
    assert (tree / "d/char").read_bytes() == b""


def test_extended_attributes(tree: Path) -> None:
    assert sorted(os.listxattr(tree / "d/marked")) == ["user.empty", "user.mark"]
    assert os.getxattr(tree / "d/marked", "user.mark") == b"\0value"
    assert os.getxattr(tree / "d/marked", "user.empty") == b""
    with pytest.raises(OSError) as caught:
        os.getxattr(tree / "d/marked", "user.none")
    assert caught.value.errno == errno.ENODATA
    shown = subprocess.run(["/usr/sbin/getcap", tree / "d/capable"], capture_output=True, text=True)
    assert shown.stdout.endswith("capable cap_net_raw=ep\n")
    assert os.getxattr(tree / "hidden", "trusted.overlay.opaque") == b"y"


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
def test_nothing_can_be_written(tree: Path, flags: int) -> None:
    with pytest.raises(OSError) as caught:
        os.open(tree / "d/file", flags)
    assert caught.value.errno == errno.EROFS
    with pytest.raises(OSError) as caught:
        (tree / "new").mkdir()
    assert caught.value.errno == errno.EROFS


def test_what_is_not_there(tree: Path) -> None:
    for _ in range(2):  # the second answer is the kernel's
        for name in ("none", "d/none", "many/none", "n" * 255):
            with pytest.raises(FileNotFoundError):
                (tree / name).lstat()
    with pytest.raises(NotADirectoryError):
        (tree / "d/file/x").lstat()


def test_statfs_tells_of_the_caches_disk(it: Shard, tree: Path) -> None:
    shown, real = os.statvfs(tree), os.statvfs(it.root)
    assert (shown.f_blocks, shown.f_frsize, shown.f_namemax) == (real.f_blocks, real.f_frsize, 255)


def test_overlay_honours_whiteouts_and_opaque_directories(
    it: Shard, tree: Path, tmp_path: Path
) -> None:
    lower = it.attach(
        layers.zstd_chunked(
            [
                layers.file("gone", b"g"),
                layers.file("hidden/old", b"o"),
                layers.file("d/below", b"b"),
            ]
        )
    )
    merged = tmp_path / "merged"
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tree}:{lower},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", str(merged)], check=True)
    try:
        assert not (merged / "gone").exists()
        assert os.listdir(merged / "hidden") == ["new"]
        assert "below" in os.listdir(merged / "d")
        # Copied up with all of its bytes.
        with (merged / "big").open("ab") as file:
            file.write(b"end")
        assert (merged / "big").read_bytes() == _BIG + b"end"
        assert len(os.listdir(merged / "many")) == 20_000
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def test_every_slot_is_listed_and_no_other(it: Shard, tree: Path) -> None:
    elsewhere = it.attach(layers.estargz([layers.file("f", b"f")]), shard=1)
    (it.root / "slots" / "999").write_bytes(b"garbage")
    assert tree.name in os.listdir(it.mountpoint)
    assert not {elsewhere.name, "999"} & set(os.listdir(it.mountpoint))
    for name in (elsewhere.name, "999"):
        with pytest.raises(OSError) as caught:
            (it.mountpoint / name).stat()
        assert caught.value.errno == errno.EIO
    for name in ("0", "01", "1000", "99999999999999999999", "x"):
        with pytest.raises(FileNotFoundError):
            (it.mountpoint / name).stat()


def test_a_shard_without_xattrs_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.shard.scene.NUMBER", 0)
    with shard(tmp_path) as it:
        tree = it.attach(layers.estargz([layers.file("a", b"a"), layers.file("b", b"b")]))
        for name in ("a", "b", "a"):
            with pytest.raises(OSError, match="not supported"):
                os.getxattr(tree / name, "user.mark")
        assert it.call("ping")["requests"]["getxattr"] == 1
