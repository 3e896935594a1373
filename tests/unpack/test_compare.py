# SPDX-License-Identifier: Apache-2.0
"""The tree that the applier makes is the one that containerd, umoci and GNU tar make, in every detail.

Differences that are meant stand in `_differs_rightly`, each with its reason.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fixtures.images import catalogue
from lazysnap.containerd.client import Containerd
from lazysnap.errors import FormatError
from lazysnap.oci import Descriptor
from lazysnap.unpack.applier import Options, Whiteouts, apply, inherit
from lazysnap.unpack.tree import NEEDS_LOWER
from tests.support import images, odd_images, tree
from tests.support.containerd import PrivateContainerd, private_containerd
from tests.unpack.corpus import compressed, digest, gnu_tar, pack, unpack

pytestmark = pytest.mark.root
_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
_HARDLY = "many"  # 100,000 files: covered by the demo's images
_ODD = [name for name in odd_images.ODD if name != _HARDLY]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    with private_containerd(tmp_path_factory.mktemp("c")) as containerd:
        yield containerd


def _layers(name: str) -> list[bytes]:
    return [pack(make()) for make in odd_images.ODD[name]]


def _differs_rightly(found: tree.Difference, listed: set[bytes], expected: tree.Tree) -> bool:
    if found.field == "gid" and found.path not in listed:
        return True  # a new directory below one with setgid, which no layer has: ours is root's
    if found.field != "mtime":
        return False
    node = expected[found.path]
    # The time of unpacking: of whiteouts, where nobody sees it, and of directories that the layer
    # leaves out, for which we take that of the layer below.
    whiteout = node["type"] == "char" and node["rdev"] == "0:0"
    return whiteout or found.path not in listed


def _listed(tar: bytes) -> set[bytes]:
    """Names that a tar has."""
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        return {os.path.normpath(os.fsencode(name)) for name in archive.getnames()} - {b"."}


def _same(ours: Path, theirs: Path, listed: set[bytes]) -> None:
    left, right = tree.read_tree(str(theirs)), tree.read_tree(str(ours))
    assert len(left) > 1
    found = [
        each for each in tree.differences(left, right) if not _differs_rightly(each, listed, left)
    ]
    assert not found, tree.report(found)


async def _by_containerd(client: Containerd, blobs: Sequence[bytes]) -> list[Path]:
    """Unpack layers in containerd's overlayfs; returns their directories, bottom first."""
    snapshots = client.snapshots("overlayfs")
    parent, directories = "", []
    for number, blob in enumerate(blobs):
        descriptor = Descriptor(media_type=_GZIP, digest=digest(blob), size=len(blob))
        await client.content.write(f"t-{descriptor.digest}", blob, descriptor.digest, {})
        name = f"{os.urandom(6).hex()}-{number}"
        root = {"containerd.io/gc.root": "test"}
        mounts = await snapshots.prepare(f"a-{name}", parent, root)
        (mount,) = mounts
        upper = [o.removeprefix("upperdir=") for o in mount.options if o.startswith("upperdir=")]
        directories.append(Path(upper[0] if upper else mount.source))
        await client.apply(descriptor, mounts)
        await snapshots.commit(name, f"a-{name}", root)
        parent = name
    return directories


@pytest.mark.containerd
@pytest.mark.parametrize("name", _ODD)
async def test_odd_layers_as_by_containerd(
    name: str, daemon: PrivateContainerd, tmp_path: Path
) -> None:
    tars = _layers(name)
    async with Containerd(daemon.address) as client, client.lease() as leased:
        theirs = await _by_containerd(leased, [compressed(tar, "gzip") for tar in tars])
        for number, tar in enumerate(tars):
            # containerd removes files for the lowest layer, and converts for the others
            mode = Whiteouts.TRUSTED if number else Whiteouts.REMOVE
            lowers = [str(path) for path in reversed(theirs[:number])]
            target = tmp_path / str(number)
            unpack(tar, target, Options(whiteouts=mode, lowers=lowers))
            _same(target, theirs[number], _listed(tar))


@pytest.mark.parametrize("name", _ODD)
def test_odd_layers_alone_and_finished_later(name: str, tmp_path: Path) -> None:
    lowers: list[str] = []
    for number, tar in enumerate(_layers(name)):
        target, alone = tmp_path / str(number), tmp_path / f"alone-{number}"
        unpack(tar, target, Options(lowers=lowers))
        try:
            applied = unpack(tar, alone, Options(alone=True))
        except FormatError as error:
            assert error.reason == NEEDS_LOWER
            assert name == "twice"
        else:
            inherit(str(alone), lowers, applied.left_out, Whiteouts.TRUSTED)
            found = tree.differences(tree.read_tree(str(target)), tree.read_tree(str(alone)))
            # whiteouts, and what no layer has, are as old as the unpacking
            found = [
                each
                for each in found
                if each.field != "mtime" or _inherited(each.path, target, lowers)
            ]
            assert not [each for each in found if each.path != b"."], tree.report(found)
        lowers.insert(0, str(target))


def _inherited(path: bytes, target: Path, lowers: Sequence[str]) -> bool:
    """Whether something is a directory in a layer and in one of those below."""
    places = [os.path.join(os.fsencode(tree), path) for tree in (target, *lowers)]
    return os.path.isdir(places[0]) and any(map(os.path.isdir, places[1:]))


@pytest.mark.containerd
@pytest.mark.slow
@pytest.mark.parametrize("name", ["py", "gcc"])
async def test_the_demos_layers_as_by_containerd(
    name: str, daemon: PrivateContainerd, tmp_path: Path
) -> None:
    built = catalogue.build(name, ["plain"])
    blobs = _stored_layers(built)
    async with Containerd(daemon.address) as client, client.lease() as leased:
        theirs = await _by_containerd(leased, blobs)
        for number, blob in enumerate(blobs):
            target = tmp_path / str(number)
            target.mkdir()
            mode = Whiteouts.TRUSTED if number else Whiteouts.REMOVE
            lowers = [str(path) for path in reversed(theirs[:number])]
            options = Options(whiteouts=mode, lowers=lowers)
            apply(io.BytesIO(blob), str(target), options, digest=digest(blob))
            with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
                listed = {os.path.normpath(os.fsencode(n)) for n in archive.getnames()} - {b"."}
            _same(target, theirs[number], listed)
            assert len(listed) > 1
            if number:
                shutil.rmtree(target)


def _stored_layers(built: catalogue.Built) -> list[bytes]:
    """The blobs of an image's plain form, bottom first, from the registry's storage."""
    blobs = built.storage / "docker/registry/v2/blobs"

    def blob(which: str) -> bytes:
        algorithm, _, name = which.partition(":")
        return (blobs / algorithm / name[:2] / name / "data").read_bytes()

    manifest = json.loads(blob(built.digests["plain"]))
    return [blob(layer["digest"]) for layer in manifest["layers"]]


_OTHER_RULES = {
    "times-negative",  # umoci keeps times before 1970
    "trusted",  # and trusted xattrs
    "links-differ",  # takes attributes from the first name, not from the last
    "parents",  # and gives directories that a layer leaves out the setgid bit of their parent
}


@pytest.mark.parametrize("name", [name for name in _ODD if name not in _OTHER_RULES])
def test_odd_images_as_by_umoci(name: str, tmp_path: Path) -> None:
    tars = _layers(name)
    layout = images.write_layout(tmp_path / "layout", [images.gzip_layer(tar) for tar in tars])
    command = ["umoci", "unpack", "--image", f"{layout.path}:latest", str(tmp_path / "bundle")]
    subprocess.run(command, check=True, capture_output=True)
    target = tmp_path / "t"
    for tar in tars:
        unpack(tar, target, Options(whiteouts=Whiteouts.REMOVE, root_entry=True))
    if name == "whiteouts":  # umoci makes no parents for the whiteout of nothing; containerd does
        (target / "never/was").rmdir()
        (target / "never").rmdir()
    if name == "modes":  # umoci leaves out empty xattrs
        os.removexattr(target / "value", "user.empty")
    listed = set().union(*map(_listed, tars))
    _same(target, tmp_path / "bundle/rootfs", listed)


def _fill(directory: Path) -> None:
    directory.mkdir()
    for number in range(40):
        inner = directory / f"d{number % 5}" / f"e{number % 7}"
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{'long' * 40}-{number}").write_bytes(os.urandom(number * 100))
        os.chown(inner / f"{'long' * 40}-{number}", number, number * 1000)
    os.setxattr(directory / "d1", "user.x", b"\0\xff")
    os.link(directory / "d1/e1" / f"{'long' * 40}-1", directory / "linked")
    os.symlink("t" * 500, directory / "symlink")
    os.mknod(directory / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(directory / "pipe")
    (directory / "big-uid").touch()
    os.chown(directory / "big-uid", 3_000_000_000, 3_000_000_001)
    for name, pieces in (("hole", 0), ("few", 3), ("many", 200)):
        with (directory / f"sparse-{name}").open("wb") as file:
            for piece in range(pieces):
                file.seek(piece * 1_000_000 + 12345)
                file.write(os.urandom(9000))
            file.truncate(pieces * 1_000_000 + 777_777)
    os.utime(directory / "d0", ns=(5, 1_222_333_444_555_666_777))
    os.chmod(directory / "d3", 0o1731)


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu", "--sparse"),
        ("--format=posix", "--sparse", "--sparse-version=0.0"),
        ("--format=posix", "--sparse", "--sparse-version=0.1"),
        ("--format=posix", "--sparse", "--sparse-version=1.0", "--xattrs"),
        ("--format=posix",),
        ("--format=oldgnu",),
    ],
    ids=" ".join,
)
def test_trees_of_gnu_tar_as_by_gnu_tar(options: tuple[str, ...], tmp_path: Path) -> None:
    _fill(tmp_path / "source")
    tar = gnu_tar(tmp_path / "source", *options)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    extract = ["tar", "-xp", "--same-owner", "--xattrs", "--xattrs-include=*", "-C", str(theirs)]
    subprocess.run(extract, input=tar, check=True)
    ours = tmp_path / "ours"
    unpack(tar, ours, Options(root_entry=True), how="zstd")
    _same(ours, theirs, {b"."} | _listed(gnu_tar(tmp_path / "source")))
    if "--sparse" in options:
        for name in ("hole", "few", "many"):
            blocks = [(where / f"sparse-{name}").stat().st_blocks for where in (ours, theirs)]
            assert blocks[0] <= blocks[1]
