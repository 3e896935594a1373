# SPDX-License-Identifier: Apache-2.0
"""Attributes from lower layers: written over a finished image, or built into it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from lazysnap.erofs.image import build
from lazysnap.erofs.trailer import overwrite, read_trailer
from lazysnap.errors import FormatError, InvalidArgument
from lazysnap.layers.slots import Inherited
from tests.erofs.scene import check, expected, mounted, names
from tests.support import layers
from tests.support.indexes import index_of, resolve
from tests.support.layers import directory, file, opaque
from tests.support.tree import read_tree

INDEX = index_of(
    layers.estargz(
        [
            directory("listed"),
            *[file(f"listed/{number}", b"x" * number) for number in range(100)],
            file("left/out/file", b"x"),
            opaque("left/opaque"),
            *[file(f"many/{number:0200}") for number in range(100)],
        ]
    )
)
LEFT_OUT = ["left", "left/out", "left/opaque", "many"]
NODES = [0, *(resolve(INDEX, path) for path in LEFT_OUT)]
IMAGE = bytes(build(INDEX))


def heirs(xattrs: list[tuple[bytes, bytes]]) -> list[Inherited]:
    return [
        Inherited(node, 0o1700 + n, 10 + n, 2**32 - 2 - n, (-1) ** n * n * 10**18 - 1, xattrs)
        for n, node in enumerate(NODES)
    ]


def wanted(xattrs: dict[bytes, bytes]) -> dict[bytes, dict[str, str]]:
    """What must be seen with `heirs`."""
    found = expected(INDEX)
    for heir, path in zip(heirs([]), [".", *LEFT_OUT], strict=True):
        fields = found[path.encode()]
        fields["mode"] = f"{heir.mode:04o}"
        fields["uid"], fields["gid"] = str(heir.uid), str(heir.gid)
        fields["mtime"] = str(heir.mtime_ns)
        fields |= {f"xattr:{name.decode()}": f"0x{value.hex()}" for name, value in xattrs.items()}
    return found


def overwritten() -> bytes:
    image = bytearray(IMAGE)
    places = read_trailer(IMAGE)
    for heir in heirs([]):
        changes = overwrite(
            places[heir.node],
            mode=heir.mode,
            uid=heir.uid,
            gid=heir.gid,
            mtime_ns=heir.mtime_ns,
        )
        for offset, data in changes:
            image[offset : offset + len(data)] = data
    return bytes(image)


def test_it_tells_of_the_root_and_of_what_is_left_out(tmp_path: Path) -> None:
    assert sorted(read_trailer(IMAGE)) == sorted(NODES)
    path = tmp_path / "image"
    path.write_bytes(IMAGE)
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert read_trailer(mapped) == read_trailer(IMAGE)


@pytest.mark.root
def test_overwritten(tmp_path: Path) -> None:
    image = overwritten()
    with mounted(image, tmp_path) as root:
        assert read_tree(root, contents=False) == wanted({})
    check(image, tmp_path)


def test_building_anew_gives_the_same_image() -> None:
    assert build(INDEX, inherited=heirs([])) == overwritten()
    assert build(INDEX) != overwritten()


@pytest.mark.root
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_with_extended_attributes(length: int, tmp_path: Path) -> None:
    xattrs = {b"user.a": b"v" * length, b"security.b": b"1"}
    image = build(INDEX, inherited=heirs(list(xattrs.items())))
    with mounted(image, tmp_path) as root:
        assert read_tree(root, contents=False) == wanted(xattrs)
    check(image, tmp_path)
    assert read_trailer(bytes(image)).keys() == read_trailer(IMAGE).keys()


@pytest.mark.root
def test_the_mark_of_an_opaque_directory_stands_once(tmp_path: Path) -> None:
    name = "trusted.overlay.opaque"
    image = build(INDEX, inherited=heirs([(name.encode(), b"x")]))
    with mounted(image, tmp_path) as root:
        assert os.listxattr(root / "left/opaque") == [name]
        assert os.getxattr(root / "left/opaque", name) == b"y"


def test_extended_attributes_that_cannot_be_stored() -> None:
    with pytest.raises(FormatError) as caught:
        build(INDEX, inherited=heirs([(b"other.a", b"")]))
    assert caught.value.reason == "xattr-not-storable"


@pytest.mark.parametrize("node", [-1, resolve(INDEX, "listed/7"), INDEX.node_count])
def test_only_directories_inherit(node: int) -> None:
    with pytest.raises(InvalidArgument):
        build(INDEX, inherited=[Inherited(node, 0o755, 0, 0, 0, [])])


def test_ids_that_cannot_be() -> None:
    for uid in (-1, 2**32):
        with pytest.raises(InvalidArgument):
            build(INDEX, inherited=[Inherited(0, 0o755, uid, 0, 0, [])])
        with pytest.raises(InvalidArgument):
            overwrite(4096, mode=0, uid=0, gid=uid, mtime_ns=0)


@pytest.mark.parametrize("length", [0, 1, 23, 24, 4096, len(IMAGE) - 24, len(IMAGE) - 1])
def test_an_image_that_is_cut_off(length: int) -> None:
    with pytest.raises(FormatError) as caught:
        read_trailer(IMAGE[:length])
    assert caught.value.reason == "bad-image"


def test_a_trailer_that_is_damaged() -> None:
    length = len(IMAGE) // 4096 * 4096
    for position in range(length, len(IMAGE)):
        damaged = bytearray(IMAGE)
        damaged[position] ^= 0x40
        with pytest.raises(FormatError):
            read_trailer(bytes(damaged))


def test_an_empty_layer() -> None:
    assert read_trailer(bytes(build(names()))) == {0: 4096}
