# SPDX-License-Identifier: Apache-2.0
"""Images are mounted by the kernel and checked by fsck.erofs; nothing here reads EROFS itself."""

from __future__ import annotations

import io
import mmap
import os
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazysnap.erofs.image import build
from lazysnap.errors import FormatError
from lazysnap.index.build import build as make
from lazysnap.index.codec import encode
from lazysnap.index.model import IMPLIED, OPAQUE, WHITEOUT
from lazysnap.index.reader import LayerIndex
from lazysnap.index.tree import Node, Tree
from tests.erofs.scene import KEYS, check, expected, grow, mounted, names, node
from tests.support import layers, odd_images, tar_entries
from tests.support.indexes import index_of, toc_of
from tests.support.tree import differences, read_tree, report

pytestmark = pytest.mark.root
_S = 10**9


def compare(index: LayerIndex, directory: Path) -> None:
    """Mount the image of an index, and compare all that stat, readlink, readdir and getxattr tell."""
    image = build(index)
    with mounted(image, directory) as root:
        found = differences(expected(index), read_tree(root, contents=False))
    assert not found, report(found)
    check(image, directory)


def test_an_empty_layer(tmp_path: Path) -> None:
    compare(grow(lambda tree: None), tmp_path)


def test_every_kind(tmp_path: Path) -> None:
    index = names(
        ("d", node(stat.S_IFDIR, 0o1777, uid=4_000_000_000, gid=2**32 - 2)),
        ("d/f", node(mode=0o6755, size=5, mtime_ns=-1)),
        ("d/empty", node(mtime_ns=-(2**63))),
        ("d/late", node(size=1, mtime_ns=2**63 - 1)),
        ("d/null", node(stat.S_IFCHR, 0o666, rdev=os.makedev(1, 3))),
        ("d/big", node(stat.S_IFCHR, 0o600, rdev=os.makedev(4095, 2**20 - 1))),
        ("d/sda", node(stat.S_IFBLK, 0o660, rdev=os.makedev(259, 70000))),
        ("d/pipe", node(stat.S_IFIFO, 0o620)),
        ("d/link", node(stat.S_IFLNK, 0o777, link="../ä")),
        ("x/y/z", node(flags=WHITEOUT)),
        ("white", node(stat.S_IFCHR, 0, flags=WHITEOUT)),
    )
    compare(index, tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in odd_images.ODD if name not in ("many", "bytes-names")]
)
def test_odd_layers(name: str, tmp_path: Path) -> None:
    for number, layer in enumerate(odd_images.ODD[name]):
        entries = list(layer())
        if name == "contents":
            entries = [entry for entry in entries if len(entry.data) < 1 << 20]
        tar = _tar(entries)
        compare(index_of(layers.estargz(tar)), tmp_path / f"estargz{number}")
        compare(
            index_of(layers.zstd_chunked(tar, dialect="containers")), tmp_path / f"zstd{number}"
        )


def _tar(entries: list[tar_entries.Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            tar_entries.add_entry(archive, entry)
    return out.getvalue()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [1, 4096, 2**32, 2**43 - 1, 2**43, 2**43 + 1, 2**50, 2**62])
def test_sizes(size: int, key: str, tmp_path: Path) -> None:
    compare(names(("a", node()), ("b", node(size=size, key=key)), ("c", node(size=1))), tmp_path)


@pytest.mark.parametrize("key", KEYS)
def test_files_read_as_zeros_without_an_overlay(key: str, tmp_path: Path) -> None:
    sizes = {"small": 1, "block": 4096, "more": 1 << 20, "large": 2**44}
    index = names(*((name, node(size=size, key=key)) for name, size in sizes.items()))
    with mounted(build(index), tmp_path) as root:
        for name, size in sizes.items():
            with (root / name).open("rb") as file:
                assert file.read(10000) == bytes(min(size, 10000))
                file.seek(max(0, size - 100))
                assert file.read() == bytes(min(size, 100))


@pytest.mark.parametrize("length", [1, 4031, 4032, 4033, 4095])
def test_symbolic_links(length: int, tmp_path: Path) -> None:
    """On both sides of what fits behind an inode, from different places in a block."""
    pairs = [(f"{n}", node(stat.S_IFLNK, 0o777, link="/x" * 2000 + "y" * n)) for n in range(1, 20)]
    other = node(stat.S_IFLNK, 0o777, link="t" * length, xattrs={b"security.x": b"v" * length})
    exact = node(stat.S_IFLNK, 0o777, link="t" * length)
    compare(names(*pairs, ("other", other), ("exact", exact)), tmp_path)


@pytest.mark.parametrize("length", [1, 7, 100, 255])
def test_directories_on_both_sides_of_a_block(length: int, tmp_path: Path) -> None:
    """The last names go from behind the inode to a block of their own and back."""

    def plant(tree: Tree) -> None:
        for size in sizes:
            for number in range(size):
                tree.add(f"{size:05}/{number:x}".ljust(6 + length, "n")[: 6 + length], node())

    sizes = [1, 2, 13, 14, 15, 16]
    if length > 1:
        for blocks in (1, 2, 3):
            full = blocks * 4096 // (12 + length)
            sizes += range(max(full - 6, 17), full + 3)
    compare(grow(plant), tmp_path)


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    def plant(tree: Tree) -> None:
        for number in range(100_000):
            tree.add(f"many/{number * 7919 % 100_003:x}-name", node(size=number % 3))

    index = grow(plant)
    image = build(index)
    with mounted(image, tmp_path) as root:
        wanted = [name for _, name, _ in index.children(index.lookup(0, b"many"))]
        assert sorted(os.listdir(os.fsencode(root / "many"))) == wanted
        for name in [*wanted[::997], wanted[0], wanted[-1]]:  # by the kernel's binary search
            child = index.lookup(1, name)
            assert (root / "many" / os.fsdecode(name)).stat().st_size == index.attributes(
                child
            ).size
        for name in ("", "0", "!", "zzz", "8000-nam", "8000-namf"):
            assert not (root / "many" / (name or "~")).exists()
    check(image, tmp_path)


def test_names_around_the_dots(tmp_path: Path) -> None:
    odd_names = [
        "!",
        "-",
        "--",
        ".-",
        ". ",
        ".!",
        "...",
        "..-",
        "..a",
        ".a",
        "/0",
        "A",
        "\x01",
        "ÿ",
    ]
    pairs = [(f"d/{name.strip('/')}", node(size=3)) for name in odd_names]
    compare(names(*pairs, *((f"e/{i:03}", node()) for i in range(500))), tmp_path)
    # with the dots at the end of a block, and at the beginning of the next
    for count in range(270, 285):
        many = [(f"{n:03}".replace("0", "!").translate(_LOW), node()) for n in range(count)]
        compare(names(*many, ("z", node()), *((f"z{n}", node()) for n in range(50))), tmp_path)


_LOW = str.maketrans("123456789", "\"#$%&'()*")


def test_deep(tmp_path: Path) -> None:
    compare(names(("/".join(["d" * 15] * 250) + "/file", node(size=9))), tmp_path)


def test_hard_links(tmp_path: Path) -> None:
    def plant(tree: Tree) -> None:
        tree.add("a/first", node(size=7, uid=5))
        for number in range(300):
            tree.link(f"{number % 7}/{number}", "a/first", node(uid=6))

    compare(grow(plant), tmp_path)


def test_opaque(tmp_path: Path) -> None:
    index = names(("o", node(stat.S_IFDIR, 0o755, flags=OPAQUE, xattrs={b"user.a": b"1"})))
    compare(index, tmp_path / "a")
    with mounted(build(index, opaque_xattr=b"user.overlay.opaque"), tmp_path / "b") as root:
        assert set(os.listxattr(root / "o")) == {"user.a", "user.overlay.opaque"}
    with mounted(build(index, opaque_xattr=b""), tmp_path / "c") as root:
        assert os.listxattr(root / "o") == ["user.a"]


def test_the_same_arguments_give_the_same_bytes() -> None:
    index = names(("a/b", node(size=4, xattrs={b"user.a": b"1"})))
    assert build(index) == build(index)


def test_a_mapped_index(tmp_path: Path) -> None:
    data = encode(make(toc_of(layers.estargz([layers.file("a/b", b"x"), layers.file("c")]))))
    path = tmp_path / "index"
    path.write_bytes(data)
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    assert build(LayerIndex(mapped)) == build(LayerIndex(data))
    mapped.close()  # nothing of what was read keeps it open


def test_an_index_that_is_damaged() -> None:
    for kind in (stat.S_IFSOCK, 0o030000):
        with pytest.raises(FormatError) as caught:
            build(names(("strange", node(kind))))
        assert caught.value.reason == "bad-index"


_name = st.text(st.sampled_from('!-.._aZ~ \x01\x7f\n"ä日😀'), min_size=1, max_size=12) | st.builds(
    lambda c, n: c * n, st.sampled_from("a.z-"), st.integers(1, 255)
)
_number = st.sampled_from([0, 1, 1000, 2**16, 2**31, 2**32 - 2])
_xattrs = st.dictionaries(
    st.sampled_from([b"user.a", b"user." + b"n" * 200, b"security.x"]),
    st.binary(max_size=30) | st.builds(bytes, st.integers(0, 9000)),
    max_size=3,
)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.integers(0, 0o7777),
    "uid": _number,
    "gid": _number,
    "mtime_ns": st.integers(-(2**63), 2**63 - 1),
}
_size = st.sampled_from([0, 1, 4095, 4096, 2**31, 2**43 + 5])
_nodes = st.one_of(
    st.builds(node, size=_size, key=st.sampled_from(KEYS), xattrs=_xattrs, **_fields),
    st.builds(node, st.just(stat.S_IFDIR), xattrs=_xattrs, **_fields),
    st.builds(node, st.just(stat.S_IFDIR), flags=st.sampled_from([OPAQUE, IMPLIED]), **_fields),
    st.builds(
        lambda n, **fields: node(stat.S_IFLNK, link="t" * n, **(fields | {"mode": 0o777})),
        st.integers(1, 4095),
        **_fields,
    ),
    st.builds(
        node,
        st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]),
        rdev=st.builds(os.makedev, st.integers(0, 4095), st.integers(0, 2**20 - 1)),
        **_fields,
    ),
    st.builds(node, st.just(stat.S_IFIFO), **_fields),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.lists(_name, min_size=1, max_size=4), _nodes), max_size=40))
def test_random_trees(entries: list[tuple[list[str], Node]]) -> None:
    def plant(tree: Tree) -> None:
        for parts, made in entries:
            made.children = {} if stat.S_ISDIR(made.mode) else None
            made.number, made.nlink = -1, 0  # hypothesis may show the same one again
            try:
                tree.add("/".join(parts), made)
            except FormatError:  # names that are too long, or below a file
                continue

    with tempfile.TemporaryDirectory(prefix="erofs-") as directory:
        compare(grow(plant), Path(directory))
