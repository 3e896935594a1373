# SPDX-License-Identifier: Apache-2.0
"""What a container sees of an image under lazysnap is what it sees under containerd's overlayfs.

Both trees are mounted and dumped completely. overlayfs gets the gzip image, lazysnap the converted
one, in which every layer must have been mounted lazily. The few differences that are allowed stand
in `_allowed`, each with its reason.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fixtures.containerd import Containerd
from fixtures.images import catalogue
from fixtures.processes import kill_leftovers, unmount_below
from fixtures.registry import Registry, registry
from tests.support import compare, odd_images, tree
from tests.support.stack import SNAPSHOTTER, Lazysnap

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd, pytest.mark.slow]

SECOND = 10**9
# Names in a table of contents are JSON strings, so they must be UTF-8: such a layer cannot be lazy.
NEVER_LAZY = {"bytes-names"}


@dataclass
class Peers:
    """A containerd with both snapshotters, and a registry with the images."""

    server: Registry
    client: Containerd
    lazysnap: Lazysnap
    work: Path
    counter: Iterator[int]
    start: int

    def ordinary(self, repository: str, form: str = "plain") -> tree.Tree:
        """The tree under overlayfs."""
        reference = f"{self.server.host}/{repository}:{form}"
        pull = ("images", "pull", "--plain-http", "--snapshotter", "overlayfs")
        self.client.ctr(*pull, reference)
        return self._tree("overlayfs", repository, form)

    def lazy(self, repository: str, form: str) -> tuple[tree.Tree, int]:
        """The tree under lazysnap, and how many layers were unpacked."""
        reference = f"{self.server.host}/{repository}:{form}"
        done = subprocess.run(
            [sys.executable, "-m", "lazysnap", "pull", reference, "--plain-http", "--json",
             "--address", self.client.address, "--snapshotter", SNAPSHOTTER],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        layers = json.loads(done.stdout)["layers"]
        found = self._tree(SNAPSHOTTER, repository, form)
        return found, sum(layer["state"] == "unpacked" for layer in layers)

    def _tree(self, snapshotter: str, repository: str, form: str) -> tree.Tree:
        chain = compare.chain_id(self.server, repository, form)
        target = self.work / f"m{next(self.counter)}"
        with compare.root_file_system(self.client, snapshotter, chain, target) as root:
            return tree.read_tree(str(root))


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    with _peers(tmp_path_factory.mktemp("c")) as found:
        yield found


@pytest.fixture(scope="module")
def peers_with_shards_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """As on a kernel that cannot serve trees itself."""
    with _peers(tmp_path_factory.mktemp("c"), "[lazy]\nkernel_trees = false\n") as found:
        yield found


@contextlib.contextmanager
def _peers(work: Path, config: str = "") -> Iterator[Peers]:
    storage = catalogue.DEFAULT_ROOT / "registry"
    storage.mkdir(parents=True, exist_ok=True)
    lazysnap = Lazysnap(work, config)
    start = time.time_ns()
    with contextlib.ExitStack() as stack:
        stack.callback(unmount_below, work)
        stack.callback(kill_leftovers, work)
        server = stack.enter_context(registry(storage, work, readonly=True))
        lazysnap.start()
        stack.callback(lazysnap.stop)
        client = stack.enter_context(Containerd(work, proxies={SNAPSHOTTER: lazysnap.address}))
        yield Peers(server, client, lazysnap, work, itertools.count(), start)


def _allowed(one: tree.Difference, ordinary_tree: tree.Tree, form: str, start: int) -> bool:
    # containerd's applier makes directories that a layer leaves out at the time it unpacks, and the
    # root directory is made with the snapshot: such a time says nothing of the image.
    made_by_applier = int(ordinary_tree[one.path].get("mtime", 0)) >= start
    if one.field == "gid" and made_by_applier:
        # ... and the kernel, not the image, hands the group down from a set-group-id directory.
        parent = ordinary_tree[os.path.dirname(one.path) or b"."]
        return bool(int(parent["mode"], 8) & stat.S_ISGID) and one.left == parent["gid"]
    # skopeo 1.9 leaves attributes with an empty value out of its table of contents.
    if form == "zstdchunked-c" and one.field.startswith("xattr:"):
        return (one.left, one.right) == ("0x", "")
    if one.field != "mtime":
        return False
    if made_by_applier:
        return True
    ordinary, lazy = int(one.left), int(one.right)
    # A table of contents by ctr-remote has whole seconds, rounded (estargz, build.go, MTime).
    rounded = (ordinary + SECOND // 2) // SECOND * SECOND
    return form != "zstdchunked-c" and lazy == rounded


def _check(peers: Peers, name: str, repository: str, form: str) -> None:
    # What is unpacked holds the table of contents as a file, as it does under overlayfs.
    unpacked = name in NEVER_LAZY
    ordinary = peers.ordinary(repository, form if unpacked else "plain")
    lazy, not_lazy = peers.lazy(repository, form)
    found = [
        one
        for one in tree.differences(ordinary, lazy)
        if one.field == "exists" or not _allowed(one, ordinary, form, peers.start)
    ]
    assert not found, tree.report(found)
    assert (not_lazy > 0) == (unpacked or form == "mixed")


@pytest.mark.parametrize("form", ["esgz", "zstdchunked", "zstdchunked-c"])
@pytest.mark.parametrize("name", [name for name in odd_images.ODD if name != "many"])
def test_odd_images_look_the_same(peers: Peers, name: str, form: str) -> None:
    image = odd_images.built(name, ["plain", form])
    _check(peers, name, image.repository, form)


@pytest.mark.parametrize("name", ["whiteouts", "parents", "links", "devices", "names", "trusted"])
def test_odd_images_look_the_same_from_shards(peers_with_shards_alone: Peers, name: str) -> None:
    image = odd_images.built(name, ["plain", "esgz"])
    _check(peers_with_shards_alone, name, image.repository, "esgz")


def test_hundred_thousand_files_look_the_same(peers: Peers) -> None:
    image = odd_images.built("many", ["plain", "esgz"])
    _check(peers, "many", image.repository, "esgz")


@pytest.mark.parametrize("form", ["esgz", "zstdchunked", "zstdchunked-c", "mixed"])
def test_debian_looks_the_same(peers: Peers, form: str) -> None:
    image = catalogue.build("py", ["plain", form], say=lambda line: None)
    _check(peers, "py", image.repository, form)
