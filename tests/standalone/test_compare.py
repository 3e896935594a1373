# SPDX-License-Identifier: Apache-2.0
"""A mounted image is what umoci unpacks of its plain form, in every detail.

From a registry and from an OCI layout. The few differences that are allowed stand in `_allowed`, each with
its reason.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fixtures.images import catalogue
from fixtures.registry import Registry, registry
from tests.standalone.scene import Scene
from tests.support import odd_images, tree

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.slow]

_SECOND = 10**9
# What umoci does like containerd and us. The others, where layers are put on top of each other (umoci
# writes them into one another) are compared with containerd's overlayfs in tests/system/test_compare.py.
_ODD = ["devices", "contents", "names", "replaced", "twice", "bytes-names"]


@dataclass
class _Server:
    registry: Registry
    work: Path
    start: int

    def layout(self, repository: str, form: str) -> Path:
        """An image as an OCI layout, copied by skopeo."""
        target = self.work / repository.replace("/", "-") / form
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            command = ["skopeo", "copy", "--quiet", "--insecure-policy", "--preserve-digests"]
            source = f"docker://{self.registry.host}/{repository}:{form}"
            command += ["--src-tls-verify=false", source, f"oci:{target}:{form}"]
            subprocess.run(command, check=True)
        return target

    def unpacked(self, repository: str) -> tree.Tree:
        """What umoci makes of the plain form."""
        image = f"{self.layout(repository, 'plain')}:plain"
        bundle = self.work / f"bundle-{repository.replace('/', '-')}"
        if not bundle.exists():
            command = ["umoci", "unpack", "--image", image, str(bundle)]
            subprocess.run(command, check=True, capture_output=True)
        return tree.read_tree(str(bundle / "rootfs"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    work = tmp_path_factory.mktemp("registry")
    storage = catalogue.DEFAULT_ROOT / "registry"
    storage.mkdir(parents=True, exist_ok=True)
    start = time.time_ns()
    with registry(storage, work, readonly=True) as found:
        yield _Server(found, work, start)


def _allowed(one: tree.Difference, unpacked: tree.Tree, form: str, start: int) -> bool:
    if one.field == "exists":
        return False
    # overlay shows one link for directories of several layers, as it does in containers.
    if one.field == "nlink" and unpacked[one.path]["type"] == "dir":
        return one.right == "1"
    # No layer has the top; umoci says that it is from 1970.
    if one.field == "mtime" and one.path == b".":
        return True
    # umoci makes what no layer has (parents, and the top) when it unpacks.
    made_by_umoci = int(unpacked[one.path].get("mtime", 0)) >= start
    if one.field == "gid" and made_by_umoci:
        return True  # and the kernel hands a group down from a set-group-id directory
    # skopeo 1.9 leaves attributes with an empty value out of its table of contents.
    if form == "zstdchunked-c" and one.field.startswith("xattr:"):
        return (one.left, one.right) == ("0x", "")
    if one.field != "mtime":
        return False
    # A table of contents by ctr-remote has whole seconds, rounded (estargz, build.go, MTime).
    rounded = (int(one.left) + _SECOND // 2) // _SECOND * _SECOND
    return made_by_umoci or int(one.right) == rounded


def _check(it: Scene, server: _Server, repository: str, form: str, source: str) -> set[str]:
    reference = f"{server.registry.host}/{repository}:{form}"
    if source == "oci":
        reference = f"oci:{server.layout(repository, form)}:{form}"
    layers = it.mount(reference, "--plain-http")
    unpacked = server.unpacked(repository)
    found = [
        one
        for one in tree.differences(unpacked, tree.read_tree(str(it.point)))
        if not _allowed(one, unpacked, form, server.start)
    ]
    assert len(unpacked) > 3
    assert not found, tree.report(found)
    it.umount()
    it.assert_clean()
    return {layer["state"] for layer in layers}


@pytest.mark.parametrize(
    ("form", "source", "states"),
    [
        ("esgz", "registry", {"lazy"}),
        ("zstdchunked-c", "oci", {"lazy"}),
        ("mixed", "registry", {"lazy", "unpacked"}),
        ("plain", "oci", {"unpacked"}),
    ],
)
def test_debian(it: Scene, server: _Server, form: str, source: str, states: set[str]) -> None:
    image = catalogue.build("py", ["plain", form], say=lambda line: None)
    assert _check(it, server, image.repository, form, source) == states


@pytest.mark.parametrize("source", ["registry", "oci"])
@pytest.mark.parametrize("name", _ODD)
def test_odd_images(it: Scene, server: _Server, name: str, source: str) -> None:
    form = "esgz" if source == "registry" else "zstdchunked"
    image = odd_images.built(name, ["plain", form])
    if name == "bytes-names":  # never lazy, and unpacked it has its table of contents as a file
        form = "plain"
    states = _check(it, server, image.repository, form, source)
    assert ("unpacked" in states) == (name == "bytes-names")
