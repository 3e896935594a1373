# SPDX-License-Identifier: Apache-2.0
"""Tars that want out, that are damaged, or that want too much; and what is left after an error."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazysnap.digest import Digest
from lazysnap.errors import (
    DigestMismatch,
    FormatError,
    Internal,
    InvalidArgument,
    LazysnapError,
)
from lazysnap.unpack.applier import Options, Whiteouts, apply
from lazysnap.unpack.root import empty
from tests.support.filesystems import tmpfs
from tests.support.tar_entries import Entry, file, folder, hardlink, opaque, symlink, whiteout
from tests.unpack.corpus import END, Short, compressed, digest, pack, pax, raw, unpack

_ESCAPES: dict[str, list[Entry]] = {
    "dots": [file("../../outside/f"), file("a/../../outside/g"), file("/../outside/h")],
    "absolute": [file("/outside/f")],
    "link": [symlink("l", "../outside"), file("l/f"), file("l/../../outside/g")],
    "absolute link": [symlink("l", "/outside"), file("l/f")],
    "chain": [symlink("a", ".."), symlink("b", "a/outside"), file("b/f"), folder("b/d", 0o700)],
    "link of a directory": [folder("d"), symlink("d", "../outside"), folder("d/x"), file("d/f")],
    "directory over a link": [symlink("d", "../outside"), folder("d", 0o700), file("d/f")],
    "file over a link": [symlink("f", "../outside/kept"), file("f", b"x", mode=0o700)],
    "hard link over a link": [file("x"), symlink("f", "../outside/kept"), hardlink("f", "x")],
    "whiteout": [symlink("l", "../outside"), whiteout("l/kept"), opaque("l")],
    "dots in a whiteout": [whiteout("a/../../outside/kept")],
    "proc": [symlink("l", "/proc/self/root/tmp"), file("l/f")],
}


def _outside(directory: Path) -> Path:
    outside = directory / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    os.chmod(outside / "kept", 0o640)
    return outside


@pytest.mark.root
@pytest.mark.parametrize("mode", list(Whiteouts))
@pytest.mark.parametrize("name", _ESCAPES)
def test_nothing_gets_out(name: str, mode: Whiteouts, tmp_path: Path) -> None:
    outside = _outside(tmp_path)
    before = [(p, p.lstat().st_mode, p.lstat().st_mtime_ns) for p in (outside, outside / "kept")]
    unpack(pack(_ESCAPES[name]), tmp_path / "target", Options(whiteouts=mode))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "target"]
    assert [p.name for p in outside.iterdir()] == ["kept"]
    assert [(p, p.lstat().st_mode, p.lstat().st_mtime_ns) for p, _, _ in before] == before
    assert (outside / "kept").read_bytes() == b"kept"


def test_hard_links_cannot_reach_out(tmp_path: Path) -> None:
    outside = _outside(tmp_path)
    for target in ("../outside/kept", "/../outside/kept", str(outside / "kept"), "l/kept"):
        tar = pack([symlink("l", "../outside"), hardlink("stolen", target)])
        with pytest.raises(FormatError, match="stolen"):
            unpack(tar, tmp_path / "target")
        assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.root
def test_somebody_who_swaps_directories_for_links_meanwhile(tmp_path: Path) -> None:
    """He cannot be stopped from spoiling the tree, but nothing may come out of it."""
    outside = _outside(tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    stop = threading.Event()
    swaps = 0
    aside = (target / f"aside-{number}" for number in itertools.count())

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            for name in ("d", "d/e"):
                path = target / name
                try:
                    path.rename(next(aside))
                    path.symlink_to(outside)
                    swaps += 1
                    path.unlink()
                except OSError:
                    pass

    entries: list[Entry] = []
    for number in range(3000):
        entries += [folder("d", 0o700), folder("d/e", 0o711), file(f"d/e/{number}", b"x")]
        entries += [symlink(f"d/l{number}", "x"), hardlink(f"d/h{number}", f"d/e/{number}")]
    tar = pack(entries)
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for turn in itertools.count():
            if turn >= 3 and swaps:  # he may come too late at first, on a busy machine
                break
            with contextlib.suppress(LazysnapError):
                apply(io.BytesIO(tar), str(target), Options(whiteouts=Whiteouts.REMOVE))
    finally:
        stop.set()
        swapper.join()
    assert [p.name for p in outside.iterdir()] == ["kept"]
    assert (outside / "kept").lstat().st_nlink == 1


_BAD: dict[str, tuple[bytes, str]] = {
    "no tar": (b"0" * 2000, "checksum"),
    "cut in a header": (raw(b"f")[:300], "cut off"),
    "cut in a file": (raw(b"f", data=b"x" * 600)[:700], "cut off"),
    "cut in an extended header": (pax((b"path", b"x" * 700))[:600], "cut off"),
    "huge extended header": (raw(b"x", b"x", size=1 << 33), "8589934592"),
    "huge long name": (raw(b"x", b"L", size=1 << 24), "16777216"),
    "one block of zeros": (bytes(512) + raw(b"f"), "single block"),
    "unknown type": (raw(b"f", b"Z") + END, "unknown type"),
    "negative size": (raw(b"f", changes={124: b"\xff" * 12}) + END, "bytes"),
    "size is no number": (raw(b"f", changes={124: b"0000000019 "}) + END, "not a number"),
    "PAX size is no number": (pax((b"size", b"1_0")) + raw(b"f") + END, "not a number"),
    "PAX without length": (raw(b"x", b"x", b"path=f\n") + END, "length"),
    "PAX length too long": (raw(b"x", b"x", b"999 path=f\n") + END, "malformed"),
    "zero in a PAX name": (pax((b"path", b"a\0b")) + raw(b"f") + END, "zero byte"),
    "device number": (raw(b"d", b"3", changes={329: b"7777777\0"}) + END, "impossible number"),
    "owner": (pax((b"uid", b"99999999999")) + raw(b"f") + END, "impossible number"),
    "owner -1": (pax((b"uid", b"-1")) + raw(b"f") + END, "impossible number"),
    "whiteout of nothing": (raw(b"a/.wh.") + END, "whiteout of nothing"),
    "whiteout of the parent": (raw(b"a/.wh...") + END, "whiteout of nothing"),
    "directory like a whiteout": (raw(b".wh.a/b") + END, "name of a whiteout"),
    "below a file": (raw(b"f") + raw(b"f/g") + END, "no directory"),
    "link to nothing": (raw(b"f", b"1", link=b"no") + END, "No such file"),
    "link to itself": (raw(b"f") + raw(b"f", b"1", link=b"./f") + END, "to itself"),
    "link to a directory": (raw(b"d", b"5") + raw(b"f", b"1", link=b"d") + END, "directory"),
    "link to the root": (raw(b"f", b"1", link=b"/") + END, "directory"),
    "name too long": (pax((b"path", b"n" * 300)) + raw(b"f") + END, "too long"),
    "loop": (raw(b"a", b"2", link=b"a") + raw(b"a/f") + END, "too many symbolic links"),
    "sparse map backwards": (
        pax(
            (b"GNU.sparse.size", b"100"),
            (b"GNU.sparse.map", b"50,10,0,10"),
        )
        + raw(b"f", data=bytes(20))
        + END,
        "contradicts itself",
    ),
    "sparse map of other size": (
        pax((b"GNU.sparse.size", b"100"), (b"GNU.sparse.map", b"0,10"))
        + raw(b"f", data=bytes(20))
        + END,
        "10 bytes",
    ),
    "empty link": (raw(b"l", b"2") + END, "No such file"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_tars_are_refused_and_leave_nothing(name: str, tmp_path: Path) -> None:
    data, says = _BAD[name]
    before = raw(b"dir/first", data=b"this one is fine") + raw(b".wh..wh..opq")
    with pytest.raises(FormatError, match=says) as caught:
        unpack(before + data, tmp_path)
    assert str(digest(before + data)) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert os.listxattr(tmp_path) == []


@pytest.mark.parametrize("how", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage behind"])
def test_damaged_streams(how: str, damage: str, tmp_path: Path) -> None:
    tar = pack([file("f", os.urandom(1 << 20)), file("last", b"x")])
    blob = bytearray(compressed(tar, how))
    if damage == "cut":
        del blob[-1000:]
    elif damage == "flipped":
        blob[len(blob) // 2] ^= 4
    else:
        blob += b"garbage"
    with pytest.raises((FormatError, DigestMismatch)):
        apply(io.BytesIO(blob), str(tmp_path), diff_id=digest(tar), digest=digest(bytes(blob)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["none", "gzip"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_another_layer_is_refused(how: str, algorithm: str, tmp_path: Path) -> None:
    tar = pack([file("a", b"data" * 5000)])
    blob = compressed(tar, how)
    right = Digest(f"{algorithm}:{hashlib.new(algorithm, blob).hexdigest()}")
    wrong = Digest(f"{algorithm}:{hashlib.new(algorithm, blob + b'x').hexdigest()}")
    target = tmp_path / "t"
    target.mkdir()
    with pytest.raises(DigestMismatch, match="the bytes that came"):
        apply(Short(blob), str(target), digest=wrong, diff_id=digest(tar))
    with pytest.raises(DigestMismatch, match="unpacks to"):
        apply(Short(blob), str(target), digest=right, diff_id=digest(b"another"))
    assert os.listdir(target) == []
    assert apply(Short(blob), str(target), digest=right).diff_id == digest(tar)


def test_what_follows_the_tar_counts_for_its_digest(tmp_path: Path) -> None:
    tar = pack([file("f", b"x")]) + b"trailing"
    assert unpack(tar, tmp_path, how="gzip").size == len(tar)


_BOMBS: dict[str, tuple[Callable[[], bytes], Options]] = {
    "file": (lambda: pack([file("f", bytes(30 << 20))]), Options(most_bytes=1 << 20)),
    "behind the tar": (lambda: pack([file("f")]) + bytes(30 << 20), Options(most_bytes=1 << 20)),
    "sparse": (
        lambda: (
            pax((b"GNU.sparse.size", b"1" + b"0" * 17), (b"GNU.sparse.map", b"")) + raw(b"f") + END
        ),
        Options(most_bytes=1 << 30),
    ),
    "entries": (
        lambda: pack([file(str(n)) for n in range(200)]),
        Options(most_bytes=1 << 30, most_entries=100),
    ),
}


@pytest.mark.parametrize("name", _BOMBS)
def test_bombs_end_at_the_limit(name: str, tmp_path: Path) -> None:
    make, options = _BOMBS[name]
    with pytest.raises(FormatError) as caught:
        unpack(make(), tmp_path, options, how="gzip")
    assert caught.value.reason == "too-big"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    tar = pack([file("a/small", b"x"), file("a/large", os.urandom(4 << 20))])
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(Internal, match="large") as caught:
            unpack(tar, disk / "t")
        assert caught.value.reason == "no-space"
        assert list((disk / "t").iterdir()) == []
    with tmpfs(tmp_path / "few", "nr_inodes=20") as disk:
        with pytest.raises(Internal, match=r"entry .f1[0-9]") as caught:
            unpack(pack([file(f"f{n}") for n in range(30)]), disk / "t")
        assert caught.value.reason == "no-space"
        assert list((disk / "t").iterdir()) == []


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("calls", [1, 2, 5, 9])
def test_cancelling_leaves_nothing(calls: int, tmp_path: Path) -> None:
    left = [calls]

    def check() -> None:
        left[0] -= 1
        if not left[0]:
            raise _Stop

    tar = pack([folder("d", 0), file("d/f", bytes(3 << 20)), symlink("l", "d"), file("g", b"x")])
    before = threading.active_count()
    with pytest.raises(_Stop):
        apply(io.BytesIO(tar), str(tmp_path), check=check)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


def test_a_source_that_fails(tmp_path: Path) -> None:
    class Broken:
        def __init__(self) -> None:
            self.parts = [pack([file("f", bytes(1 << 20))])[: 1 << 18]]

        def read(self, _size: int) -> bytes:
            if not self.parts:
                raise OSError(5, "Input/output error")
            return self.parts.pop()

    with pytest.raises(Internal, match="cannot be read"):
        apply(Broken(), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_target_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"x")
    tar = pack([file("f")])
    with pytest.raises(InvalidArgument, match="not empty"):
        unpack(tar, tmp_path)
    with pytest.raises(InvalidArgument, match="No such file"):
        apply(io.BytesIO(tar), str(tmp_path / "missing"))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_emptying_deep_and_wide_trees(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / "t" / "wide" / str(number)).mkdir(parents=True)
    entries = [folder("/".join(["d"] * 1500)), symlink("s", "/".join(["d"] * 1500))]
    unpack(pack([*entries, folder("s/" + "/".join(["d"] * 1500))]), tmp_path / "deep")
    for name in ("t", "deep"):
        fd = os.open(tmp_path / name, os.O_RDONLY)
        empty(fd)
        os.close(fd)
        assert list((tmp_path / name).iterdir()) == []


_names = st.lists(st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq"]), max_size=4)
_kinds = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
)
_entries = st.builds(
    lambda name, kind, target, data: Entry(
        "/".join(name).encode() or b"x",
        kind,
        data if kind == tarfile.REGTYPE else b"",
        target="/".join(target).encode() or b"y",
    ),
    _names,
    _kinds,
    _names,
    st.sampled_from([b"", b"data"]),
)


@pytest.mark.root
@pytest.mark.parametrize("mode", list(Whiteouts))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(entries=st.lists(_entries, max_size=12))
def test_any_mixture_stays_inside(
    mode: Whiteouts, tmp_path: Path, entries: Sequence[Entry]
) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    (tmp_path / "in").mkdir()
    target = tmp_path / "in" / "target"
    failed = False
    try:
        unpack(pack(entries), target, Options(whiteouts=mode))
    except FormatError:
        failed = True
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["target"]
    if failed:
        assert list(target.iterdir()) == []
