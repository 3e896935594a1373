# SPDX-License-Identifier: Apache-2.0
"""Trees: against tarfile for what a tar can say, case by case for what only a hostile one says."""

from __future__ import annotations

import json
import os
import stat
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazysnap.errors import FormatError, LazysnapError, NotLazy
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.dump import dump
from lazysnap.index.model import IMPLIED, LISTED_ROOT, OPAQUE, WHITEOUT
from lazysnap.index.reader import LayerIndex
from tests.support import layers
from tests.support.indexes import index_of, read, resolve, toc_of
from tests.support.layers import (
    Layer,
    LayerEntry,
    directory,
    file,
    hardlink,
    opaque,
    symlink,
    whiteout,
)
from tests.support.tarview import contents, describe


def table(*entries: dict[str, Any], data: bytes = b"") -> Layer:
    """A layer with this table of contents, whatever it says."""
    toc = json.dumps({"version": 1, "entries": entries}, ensure_ascii=True).encode()
    return layers.finish_estargz(data or bytes(1000), toc)


def entry(name: str, type: str = "reg", **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": type, **fields}


def indexed(*entries: dict[str, Any]) -> LayerIndex:
    return index_of(table(*entries))


def paths(index: LayerIndex) -> list[str]:
    return [line.split()[0] for line in dump(index)]


def check(layer: Layer) -> LayerIndex:
    """Compare with tarfile: the tree, and every byte."""
    index = index_of(layer)
    expected = [line for line in describe(layer.tar) if not line.startswith("/ ")]
    found = [line for line in dump(index) if not line.startswith("/ ")]
    assert found == expected
    for path, data in contents(layer.tar).items():
        assert read(index, layer.blob, resolve(index, path)) == data
    return index


TREE = [
    directory("a", mode=0o2750, uid=1, gid=2),
    file("a/b", os.urandom(5000), xattrs={"user.x": b"1"}),
    file("a/zeros", bytes(10_000)),
    file("a/empty"),
    hardlink("a/c", "a/b"),
    symlink("a/l", "/elsewhere"),
    LayerEntry("a/null", "char", device=(1, 3)),
    LayerEntry("a/pipe", "fifo"),
    file("deep/er/file", b"x" * 3000, mtime_ns=10**18),
    whiteout("a/gone"),
    opaque("deep/er"),
    file("a/b2", b"y"),
]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 700}, {"prioritized": ["a/b"]}])
@pytest.mark.parametrize("gather", [0, 20_000])
def test_estargz(options: dict[str, Any], gather: int) -> None:
    index = check(layers.estargz(TREE, min_chunk_size=gather, **options))
    assert index.kind == "estargz"
    if gather:
        assert index.member_count < index.chunk_count


@pytest.mark.parametrize("options", [{}, {"chunk_size": 700}, {"prioritized": ["a/b"]}])
def test_zstd_chunked_by_stargz(options: dict[str, Any]) -> None:
    assert check(layers.zstd_chunked(TREE, **options)).kind == "zstd:chunked"


@pytest.mark.parametrize("size", [1500, 4 << 20])
def test_zstd_chunked_by_containers(size: int) -> None:
    tree = [*TREE, file("a/fraction", b"1", mtime_ns=1_600_000_000_123_456_789)]
    index = check(layers.zstd_chunked(tree, dialect="containers", chunk_size=size))
    zeros = [n for n in range(index.chunk_count) if index.chunk(n).member < 0]
    assert all(index.chunk(n).digest is None for n in zeros)
    assert zeros
    found = []
    for node in range(index.node_count):
        if stat.S_ISREG(index.attributes(node).mode):
            content = index.file(node)
            found += [content.first_chunk + hole for hole in index.holes(content)]
    assert sorted(set(found)) == zeros


NAMES = st.sampled_from(["a", "b", "ü", "c d", "Z", "x" * 150])
DIRECTORIES = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@st.composite
def trees(draw: st.DrawFn) -> list[LayerEntry]:
    """Random entries that an unpack accepts: no file is a parent, link targets exist."""
    found: dict[str, str] = {}  # path to type
    entries: list[LayerEntry] = []
    for path in draw(st.lists(DIRECTORIES, max_size=12)):
        parents = [path[:i] for i, char in enumerate(path) if char == "/"]
        if any(found.get(parent, "dir") != "dir" for parent in parents):
            continue
        files = sorted(p for p, kind in found.items() if kind == "reg" and p != path)
        kind = draw(st.sampled_from(["dir", "reg", "symlink", "whiteout", "opaque", "hardlink"]))
        below = [p for p in found if p.startswith(path + "/")]
        for parent in parents:
            found.setdefault(parent, "dir")
        if kind == "whiteout":
            if len(path.rpartition("/")[2].encode()) < 250:
                entries.append(whiteout(path))
            continue
        if kind == "opaque":
            if found.get(path, "dir") == "dir":
                entries.append(opaque(path))
                found[path] = "dir"
            continue
        target = draw(st.sampled_from(files)) if kind == "hardlink" and files else ""
        if target in below or (kind == "hardlink" and not target):
            continue
        if kind != "dir":
            for name in below:
                del found[name]
        data = draw(st.binary(max_size=40)) if kind == "reg" else b""
        found[path] = "reg" if kind == "hardlink" else kind
        entries.append(
            LayerEntry(
                path,
                kind,
                data * draw(st.integers(1, 100)),
                mode=draw(st.integers(0, 0o7777)),
                uid=draw(st.integers(0, 70000)),
                link=target or ("somewhere" if kind == "symlink" else ""),
            )
        )
    return entries


@settings(deadline=None, max_examples=100)
@given(trees(), st.integers(1, 2000), st.integers(0, 3))
def test_random_trees(entries: list[LayerEntry], size: int, form: int) -> None:
    if form == 0:
        check(layers.estargz(entries, chunk_size=size))
    elif form == 1:
        check(layers.estargz(entries, chunk_size=size, min_chunk_size=size * 2))
    elif form == 2:
        check(layers.zstd_chunked(entries, chunk_size=size))
    else:
        check(layers.zstd_chunked(entries, dialect="containers", chunk_size=size))


def test_the_root_keeps_the_attributes_of_an_unpack() -> None:
    index = indexed(entry("./", "dir", mode=0o700, uid=5, xattrs={"user.x": "MQ=="}))
    found = index.attributes(0)
    assert (found.mode & 0o7777, found.uid, found.flags) == (0o755, 0, LISTED_ROOT)
    assert index.xattrs(0) == ()
    assert index.recorded_root is not None
    assert (index.recorded_root.mode & 0o7777, index.recorded_root.uid) == (0o700, 5)
    assert indexed().recorded_root is None


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a/..", "./../.."])
def test_anything_at_the_root_is_ignored(name: str) -> None:
    for kind in ("reg", "dir", "fifo", "symlink"):
        assert paths(indexed(entry(name, kind, linkName="x"), entry("f"))) == ["/", "/f"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("../../etc/passwd", "/etc/passwd"),
        ("a/../../b", "/b"),
        ("/absolute", "/absolute"),
        ("a//b/./c/", "/a/b/c"),
        ("a/b/../c", "/a/c"),
    ],
)
def test_names_are_confined_to_the_root(name: str, path: str) -> None:
    assert paths(indexed(entry(name)))[-1] == path


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 256, "ü" * 128, "a/" * 2100 + "b", "d" * 256 + "/f", ".wh.d/f"]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(FormatError):
        indexed(entry(name))


def test_paths_may_not_grow_through_links() -> None:
    long = "/".join(["d" * 200] * 19)
    with pytest.raises(FormatError, match="path of more than"):
        indexed(
            entry(long, "dir"),
            entry("link", "symlink", linkName=long),
            entry("link/" + "e" * 200 + "/" + "f" * 200, "dir"),
        )


def test_names_that_were_not_utf8() -> None:
    for wrong in (
        entry("bad\ufffd"),
        entry("l", "symlink", linkName="\ufffd"),
        entry("h", "hardlink", linkName="\ufffd"),
        entry("f", xattrs={"user.\ufffd": ""}),
    ):
        with pytest.raises(NotLazy) as caught:
            indexed(wrong)
        assert caught.value.reason == "non-utf8-names"


@pytest.mark.parametrize("kind", ["chunk", "", "socket", "REG", "toc"])
def test_unknown_types(kind: str) -> None:
    with pytest.raises(FormatError):
        indexed(entry("f", kind))


@pytest.mark.parametrize("kind", ["reg", "fifo", "char"])
def test_what_is_no_directory_has_nothing_below(kind: str) -> None:
    with pytest.raises(FormatError, match="not a directory"):
        indexed(entry("f", kind), entry("f/below"))


def test_links_that_go_round() -> None:
    with pytest.raises(FormatError, match="too many symbolic links"):
        indexed(
            entry("a", "symlink", linkName="b"), entry("b", "symlink", linkName="a"), entry("a/f")
        )


def test_links_that_multiply() -> None:
    """Each link doubles the way: without a bound this would be 2**40 steps, and never end."""
    entries = [entry(f"l{i}", "symlink", linkName=f"l{i + 1}/l{i + 1}") for i in range(40)]
    with pytest.raises(FormatError, match="too many symbolic links"):
        indexed(*entries, entry("l40", "symlink", linkName="/"), entry("l0/f"))


@pytest.mark.parametrize(
    "entries",
    [
        [entry("a", "hardlink", linkName="b"), entry("b", "hardlink", linkName="a")],
        [entry("a", "hardlink", linkName="a")],
        [entry("a", "hardlink", linkName="b"), entry("b", "dir")],
        [entry("b", "dir"), entry("a", "hardlink", linkName="b")],
        [entry("a", "hardlink", linkName="/")],
        [entry("a", "hardlink", linkName="")],
    ],
)
def test_hard_links_without_an_end(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(FormatError):
        indexed(*entries)


@pytest.mark.parametrize("target", ["gone", "d/gone", "gone/gone"])
def test_hard_links_out_of_the_layer(target: str) -> None:
    with pytest.raises(FormatError) as caught:
        indexed(entry("d", "dir"), entry("f"), entry("a", "hardlink", linkName=target))
    assert caught.value.reason == "hardlink-outside-layer"


def test_hard_links_to_later_names() -> None:
    index = indexed(
        entry("a", "hardlink", linkName="b"),
        entry("b", "hardlink", linkName="./d/c"),
        entry("d/c", mode=0o600, uid=4),
        entry("other", "hardlink", linkName="a"),
    )
    nodes = {resolve(index, path) for path in ("a", "b", "d/c", "other")}
    assert len(nodes) == 1
    found = index.attributes(nodes.pop())
    assert (found.nlink, found.mode & 0o777, found.uid) == (4, 0o600, 4)


def _counted(work: Callable[[], LayerIndex]) -> tuple[LayerIndex, int]:
    """What `work` returns, and how many lines of Python that took: time, but for the machine."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return work(), lines
    finally:
        sys.settrace(before)


def test_a_long_chain_of_hard_links() -> None:
    """Without a stack overflow, and in steps that grow with the length and not with its square."""
    steps = []
    for count in (1_000, 4_000, 20_000):
        chain = [entry(f"l{i}", "hardlink", linkName=f"l{i + 1}") for i in range(count)]
        toc = toc_of(table(*chain, entry(f"l{count}")))
        index, lines = _counted(lambda toc=toc: LayerIndex(encode(build(toc))))
        assert index.attributes(index.lookup(0, b"l0")).nlink == count + 1
        steps.append(lines / count)
    assert steps[2] < 2 * steps[0], steps


def test_a_replaced_name_leaves_the_inode_to_its_other_names() -> None:
    index = indexed(
        entry("name", mode=0o600),
        entry("link", "hardlink", linkName="name", mode=0o600),
        entry("name"),
    )
    link, name = resolve(index, "link"), resolve(index, "name")
    assert link != name
    assert index.attributes(link).nlink == index.attributes(name).nlink == 1


def test_whiteouts() -> None:
    index = indexed(
        entry("d", "dir"),
        entry("d/.wh.gone", uid=5, mode=0o644, modtime="2020-01-01T00:00:00Z"),
        entry("d/.wh.here"),
        entry("d/here", mode=0o600),
        entry(".wh..wh.odd"),
        entry("d/.wh..wh..opq"),
        entry(".wh..wh..opq"),
    )
    assert paths(index) == ["/", "/.wh.odd", "/d", "/d/gone", "/d/here"]
    found = index.attributes(resolve(index, "d/gone"))
    assert found == (0o020000, 0, 0, 1, 0, 0, 1577836800 * 10**9, WHITEOUT)
    assert index.attributes(resolve(index, "d/here")).mode & 0o777 == 0o600
    assert index.attributes(resolve(index, "d")).flags == OPAQUE
    assert index.attributes(0).flags == OPAQUE


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh."])
def test_whiteouts_of_nothing(name: str) -> None:
    with pytest.raises(FormatError):
        indexed(entry(name))


def test_attributes_that_a_layer_may_not_set() -> None:
    value = "MQ=="
    all_names = (
        "trusted.overlay.opaque",
        "trusted.x",
        "user.overlay.opaque",
        "user.x",
        "security.capability",
        "system.posix_acl_access",
        "nonsense",
        "",
    )
    xattrs = dict.fromkeys(all_names, value)
    index = indexed(entry("f", xattrs=xattrs), entry("l", "symlink", linkName="f", xattrs=xattrs))
    kept = [name for name, _ in index.xattrs(resolve(index, "f"))]
    assert kept == [b"security.capability", b"system.posix_acl_access", b"user.x"]
    kept = [name for name, _ in index.xattrs(resolve(index, "l"))]
    assert kept == [b"security.capability", b"system.posix_acl_access"]


@pytest.mark.parametrize(
    "wrong",
    [
        entry("f", uid=-1),
        entry("f", uid=2**32 - 1),
        entry("f", gid=2**70),
        entry("f", size=-1),
        entry("f", size=2**63),
        entry("f", modtime="yesterday"),
        entry("f", "char", devMajor=1 << 12),
        entry("f", "block", devMinor=-1),
        entry("f", "symlink"),
        entry("f", "symlink", linkName="x" * 4096),
        entry("f", "symlink", linkName="a\0b"),
        entry("f", xattrs={"user." + "x" * 251: ""}),
        entry(".prefetch.landmark", offset=10**6),
    ],
)
def test_impossible_attributes(wrong: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        indexed(wrong)


def test_implied_directories_are_marked_until_they_are_listed() -> None:
    index = indexed(entry("a/b/c/f"), entry("a/b", "dir", mode=0o700))
    assert [path for _, path in index.implied()] == [b"/a", b"/a/b/c"]
    for node, path in index.implied():
        assert index.attributes(node).flags == IMPLIED
        assert resolve(index, path.decode()) == node
    assert index.attributes(resolve(index, "a/b")).mode & 0o777 == 0o700


def test_implied_directories_count() -> None:
    """Four kilobytes of name may make two thousand directories."""
    entries = [entry(f"{i}/" + "d/" * 2000 + "f", "dir") for i in range(20)]
    toc = toc_of(table(*entries))
    assert build(toc, max_nodes=50_000)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="too many"):
            build(toc, max_nodes=5000)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_too_many_entries() -> None:
    toc = toc_of(table(*[entry(str(i), "dir") for i in range(20)]))
    with pytest.raises(FormatError, match="more than 19"):
        build(toc, max_entries=19)


def test_memory_and_steps_for_a_large_layer() -> None:
    """Two kilobytes a file to build an index; and opening one does not look at the files."""
    digest = "sha256:" + "ab" * 32
    entries = [
        entry(f"d{i // 100}/file-{i}", size=10, offset=i, digest=digest, chunkDigest=digest)
        for i in range(50_000)
    ]
    toc = toc_of(table(*entries, data=bytes(50_001)))
    data = encode(build(toc))
    assert len(data) < 12 << 20
    tracemalloc.start()
    try:
        encode(build(toc))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    index, lines = _counted(lambda: LayerIndex(data))
    assert lines < 1_000
    assert index.file(resolve(index, "d400/file-40001")).size == 10


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(-(2**65), 2**65),
    st.integers(0, 2000),
    st.sampled_from(["", "x", "a", "a/b", "..", "zeros", "sha256:" + "0" * 64, None, [], {}]),
)
FIELDS = st.sampled_from(
    (
        *("name", "type", "size", "modtime", "linkName", "mode", "uid", "gid", "devMajor"),
        *("offset", "innerOffset", "endOffset", "xattrs", "digest"),
        *("chunkOffset", "chunkSize", "chunkDigest", "chunkType"),
    )
)
MUTATIONS = st.tuples(st.integers(0, 30), FIELDS, VALUES)
BASE = layers.estargz(TREE, chunk_size=700, min_chunk_size=1000)


@settings(deadline=None, max_examples=300)
@given(st.lists(MUTATIONS, min_size=1, max_size=3))
def test_mutated_tables_give_our_errors_only(mutations: list[tuple[int, str, Any]]) -> None:
    toc = json.loads(BASE.toc)
    for number, key, value in mutations:
        toc["entries"][number % len(toc["entries"])][key] = value
    layer = layers.finish_estargz(BASE.blob[: BASE.toc_offset], json.dumps(toc).encode())
    try:
        index = index_of(layer)
    except LazysnapError:
        return
    assert list(dump(index))
    for number in range(index.chunk_count):
        chunk = index.chunk(number)
        assert index.chunk_at(chunk.node, chunk.file_offset) == number
