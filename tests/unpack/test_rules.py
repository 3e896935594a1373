# SPDX-License-Identifier: Apache-2.0
"""Each rule of the applier by a tar of a few entries; what other programs make is in test_compare."""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from pathlib import Path

import pytest

from lazysnap.errors import FormatError
from lazysnap.unpack.applier import Options, Whiteouts
from lazysnap.unpack.tree import NEEDS_LOWER
from tests.support.tar_entries import (
    Entry,
    capability,
    file,
    folder,
    hardlink,
    opaque,
    symlink,
    whiteout,
)
from tests.unpack.corpus import END, pack, pax, raw, unpack

root = pytest.mark.root
_OPAQUE = "trusted.overlay.opaque"


@pytest.mark.parametrize("how", ["none", "gzip", "zstd", "gzip-members", "zstd-members"])
def test_compressions(how: str, tmp_path: Path) -> None:
    data = os.urandom(3_000_000) + bytes(2_000_000)
    tar = pack([file("a/data", data), file("b", b"x")])
    applied = unpack(tar, tmp_path / "t", how=how)
    assert (tmp_path / "t/a/data").read_bytes() == data
    assert (applied.size, applied.entries) == (len(tar), 2)


def _is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


@root
def test_overlay_whiteouts(tmp_path: Path) -> None:
    tar = pack([folder("d"), whiteout("d/gone"), whiteout("missing/parent/gone"), opaque("o/p")])
    unpack(tar, tmp_path)
    assert _is_whiteout(tmp_path / "d/gone")
    assert _is_whiteout(tmp_path / "missing/parent/gone")
    assert os.getxattr(tmp_path / "o/p", _OPAQUE) == b"y"
    marked = [path for path in (".", "o", "d", "missing") if os.listxattr(tmp_path / path)]
    assert marked == []  # said nowhere else in the tar
    assert os.listdir(tmp_path / "o/p") == []


@root
def test_user_whiteouts(tmp_path: Path) -> None:
    tar = pack([opaque("o"), folder("x", xattrs={"user.overlay.opaque": b"y", "user.mine": b"1"})])
    unpack(tar, tmp_path, Options(whiteouts=Whiteouts.USER))
    assert os.listxattr(tmp_path / "o") == ["user.overlay.opaque"]
    assert os.listxattr(tmp_path / "x") == ["user.mine"]


@root
@pytest.mark.parametrize(
    "entries",
    [
        [file("a/f"), folder("a")],
        [file("a/b/f"), folder("c"), symlink("c", "a")],
        [file(f"{number}/f") for number in range(5000)],
    ],
)
def test_what_cannot_be_unpacked_without_those_below(entries: list[Entry], tmp_path: Path) -> None:
    tar = pack(entries)
    with pytest.raises(FormatError) as caught:
        unpack(tar, tmp_path / "alone", Options(alone=True))
    assert caught.value.reason == NEEDS_LOWER
    assert list((tmp_path / "alone").iterdir()) == []
    unpack(tar, tmp_path / "with")


@root
@pytest.mark.parametrize("first", ["whiteout", "entry"])
def test_a_whiteout_does_not_hide_its_own_layer(first: str, tmp_path: Path) -> None:
    pairs = [
        (whiteout("file"), file("file", b"x")),
        (whiteout("dir"), folder("dir")),
        (whiteout("implied"), file("implied/file", b"x")),
    ]
    entries = [each for pair in pairs for each in (pair if first == "whiteout" else pair[::-1])]
    unpack(pack(entries), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"x"
    assert (tmp_path / "dir").is_dir()
    assert (tmp_path / "implied/file").read_bytes() == b"x"


def test_removing_whiteouts(tmp_path: Path) -> None:
    low = [file(f"{d}/{n}", b"low") for d in ("gone", "merged", "opaque", "deep/a/b") for n in "12"]
    unpack(pack([*low, file("single", b"low")]), tmp_path, _REMOVE)
    high = [
        whiteout("gone"),
        file("merged/new", b"high"),
        whiteout("merged"),
        file("opaque/before/x", b"high"),
        opaque("opaque"),
        file("opaque/1", b"high"),
        opaque("deep"),
        whiteout("single"),
        whiteout("never/was/there"),
    ]
    unpack(pack(high), tmp_path, _REMOVE)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {
        *("merged", "merged/new", "opaque", "opaque/before", "opaque/before/x", "opaque/1"),
        *("deep", "never", "never/was"),
    }
    assert (tmp_path / "opaque/1").read_bytes() == b"high"


_REMOVE = Options(whiteouts=Whiteouts.REMOVE)


@root
def test_stray_trusted_xattrs_hide_nothing(tmp_path: Path) -> None:
    stray = {"trusted.overlay.opaque": b"y", "trusted.overlay.redirect": b"/etc", "user.ok": b"1"}
    tar = pack([folder("d", xattrs=stray), file("d/f", b"x", xattrs=stray)])
    applied = unpack(tar, tmp_path)
    assert os.listxattr(tmp_path / "d") == ["user.ok"]
    assert os.listxattr(tmp_path / "d/f") == ["user.ok"]
    assert applied.ignored_xattrs == 4
    assert '"trusted.overlay.opaque"' in applied.examples


@root
def test_order_of_owner_capability_and_setuid(tmp_path: Path) -> None:
    caps = {"security.capability": capability(1 << 13)}
    unpack(
        pack(
            [
                file("f", b"x", mode=0o4755, uid=5, gid=6, xattrs=caps),
                hardlink("g", "f", mode=0o4755, uid=5, gid=6),
            ]
        ),
        tmp_path,
    )
    status = (tmp_path / "f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4755, 5, 6)
    assert os.getxattr(tmp_path / "f", "security.capability") == caps["security.capability"]
    assert status.st_nlink == 2


@root
def test_user_xattrs_of_links_and_devices_are_left_out(tmp_path: Path) -> None:
    wanted = {"user.no": b"1", "security.yes": b"2"}
    device = Entry(b"null", tarfile.CHRTYPE, device=(1, 3), xattrs=wanted)
    unpack(pack([symlink("l", "nowhere", xattrs=wanted), device]), tmp_path)
    assert os.listxattr(tmp_path / "l", follow_symlinks=False) == ["security.yes"]
    assert os.listxattr(tmp_path / "null") == ["security.yes"]


def test_times_are_exact_and_directories_come_last(tmp_path: Path) -> None:
    when = 1_234_567_890_123_456_789
    entries = [
        folder("d", mtime=when),
        file("d/a", b"x", mtime=when),
        symlink("d/l", "a", mtime=when),
    ]
    unpack(pack(entries), tmp_path)
    paths = [tmp_path / "d", tmp_path / "d/a", tmp_path / "d/l"]
    assert [path.lstat().st_mtime_ns for path in paths] == [when] * 3


@pytest.mark.parametrize(
    ("mtime", "atime", "expected"),
    [
        (b"-5.25", b"-1", (0, 0)),
        (b"99999999999999", b"1", (0, 0)),
        (b"100.25", b"7", (100_250_000_000, 100_250_000_000)),
        (b"100.000000001999", b"200", (100_000_000_001, 200 * 10**9)),
    ],
)
def test_odd_times(mtime: bytes, atime: bytes, expected: tuple[int, int], tmp_path: Path) -> None:
    unpack(pax((b"mtime", mtime), (b"atime", atime)) + raw(b"f") + END, tmp_path)
    status = (tmp_path / "f").stat()
    assert (status.st_mtime_ns, status.st_atime_ns) == expected


@root
def test_left_out_directories_are_as_in_the_layers_below(tmp_path: Path) -> None:
    when = 1_111_111_111_000_000_007
    low = [
        folder("a", 0o711, uid=11, gid=12, mtime=when, xattrs={"user.of": b"a"}),
        folder("a/b", 0o2775, uid=13, mtime=when),
        symlink("way", "/a"),
        file("c", b"no directory"),
    ]
    lower, lowest, upper = tmp_path / "1", tmp_path / "0", tmp_path / "2"
    unpack(pack([folder("a", 0o700), folder("c", 0o700), folder("only", 0o500)]), lowest)
    unpack(pack(low), lower)
    os.setxattr(lower / "a", "trusted.overlay.opaque", b"y")
    high = [file("a/b/new/f"), file("c/f"), file("only/f"), file("way/x")]
    upper.mkdir()
    unpack(pack(high), upper, Options(lowers=[str(lower), str(lowest)]))

    def facts(path: str) -> tuple[int, int, int]:
        status = (upper / path).stat()
        return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid

    assert facts("a") == (0o711, 11, 12)
    assert (upper / "a").stat().st_mtime_ns == when
    assert os.listxattr(upper / "a") == ["user.of"]
    assert facts("a/b") == (0o2775, 13, 0)
    assert facts("a/b/new") == (0o755, 0, 0)
    assert facts("c") == (0o755, 0, 0)  # a file in the nearer layer ends the search
    assert facts("only") == (0o500, 0, 0)
    assert facts("way") == (0o711, 11, 12)


@root
def test_a_root_entry_is_ignored_unless_wanted(tmp_path: Path) -> None:
    tar = pack([folder("./", 0o700, uid=9, mtime=5 * 10**9), file("./f", b"x")])
    for wanted in (False, True):
        target = tmp_path / str(wanted)
        unpack(tar, target, Options(root_entry=wanted))
        status = target.stat()
        assert (status.st_uid == 9, status.st_mtime == 5) == (wanted, wanted)


def test_later_entries_replace_earlier_ones(tmp_path: Path) -> None:
    entries = [
        file("a", b"1"), folder("a"), file("a/x", b"2"), file("a", b"3"),
        symlink("l", "a"), file("l", b"4"),
        folder("d/e"), file("d/e/f"), symlink("d", "elsewhere"), file("d/new", b"5"),
        Entry(b"p", tarfile.FIFOTYPE), file("p", b"6"),
    ]  # fmt: skip
    unpack(pack(entries), tmp_path)
    assert (tmp_path / "a").read_bytes() == b"3"
    assert (tmp_path / "l").read_bytes() == b"4"
    assert not (tmp_path / "l").is_symlink()
    assert os.readlink(tmp_path / "d") == "elsewhere"
    assert (tmp_path / "elsewhere/new").read_bytes() == b"5"
    assert not (tmp_path / "elsewhere/e").exists()
    assert (tmp_path / "p").read_bytes() == b"6"


def test_long_names_in_all_formats(tmp_path: Path) -> None:
    name = "/".join(["d" * 90] * 8) + "/" + "n" * 200
    target = "t" * 3000
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        where = tmp_path / str(form)
        unpack(pack([file(name, b"x"), symlink("l", target)], form), where)
        assert (where / name).read_bytes() == b"x"
        assert os.readlink(where / "l") == target
    middle = "p" * 120 + "/" + "n" * 90  # fits into ustar's prefix
    unpack(pack([file(middle, b"y")], tarfile.USTAR_FORMAT), tmp_path / "ustar")
    assert (tmp_path / "ustar" / middle).read_bytes() == b"y"


def test_trees_that_are_deeper_than_a_path_may_be_long(tmp_path: Path) -> None:
    down = "/".join(["deep-directory"] * 100)
    entries = [
        folder(down),
        symlink("a", down),
        folder(f"a/{down}"),
        symlink("b", f"a/{down}"),
        folder(f"b/{down}"),
        symlink("c", f"b/{down}"),
        folder(f"c/{down}"),
        file(f"c/{down}/f", b"bottom"),
        file("deep-directory", b"and all of it goes again"),
    ]
    target = tmp_path / "t"
    unpack(pack(entries), target)
    assert (target / "deep-directory").read_bytes() == b"and all of it goes again"


def test_an_ordinary_user_owns_what_he_unpacks(tmp_path: Path) -> None:
    unpack(pack([file("d/f", b"x", uid=4242, mode=0o400)]), tmp_path, Options(same_owner=False))
    status = (tmp_path / "d/f").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o400)


@root
def test_as_an_ordinary_user(tmp_path: Path) -> None:
    """In a child that has given up root: closed directories, and no owners."""
    os.chmod(tmp_path, 0o777)
    for parent in list(tmp_path.parents)[:-1]:
        if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o5 != 0o5 and parent != Path("/"):
            os.chmod(parent, parent.stat().st_mode | 0o5)
    entries = [folder("closed", 0o500, uid=7), file("closed/f", b"x", mode=0, uid=7)]
    tar = pack([*entries, folder("deeper/shut", 0), hardlink("g", "closed/f", mode=0, uid=7)])
    target = tmp_path / "t"
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            unpack(tar, target, _REMOVE)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (target / "closed/f").stat().st_uid == 65534
    assert stat.S_IMODE((target / "closed").stat().st_mode) == 0o500
    assert stat.S_IMODE((target / "deeper/shut").stat().st_mode) == 0
    assert (target / "g").stat().st_nlink == 2


def test_devices_can_be_left_out(tmp_path: Path) -> None:
    device = Entry(b"null", tarfile.CHRTYPE, device=(1, 3))
    unpack(pack([device, Entry(b"pipe", tarfile.FIFOTYPE)]), tmp_path, Options(devices=False))
    assert os.listdir(tmp_path) == ["pipe"]


def test_no_thread_stays(tmp_path: Path) -> None:
    before = threading.active_count()
    unpack(pack([file("f", b"x")]), tmp_path)
    assert threading.active_count() == before
