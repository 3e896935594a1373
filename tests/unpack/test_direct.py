# SPDX-License-Identifier: Apache-2.0
"""`eager = "direct"`: layers that cannot be lazy, from the registry into snapshots without containerd."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from tests.support import images, layers, tree
from tests.support.stack import SNAPSHOTTER, Stack, stack, wait_until
from tests.unpack.direct import CONFIG, left_over, seen

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

_EXPECTED = "hello from the top layer\nlazysnap test image\n"
_SECONDS = 120


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path, config=CONFIG) as it:
        yield it


def _layers_in_containerd(it: Stack) -> set[str]:
    """What of the content store is neither a manifest nor a configuration."""
    found = set()
    for digest in it.containerd.contents():
        command = it.containerd.command("content", "get", digest)
        data = subprocess.run(command, check=True, capture_output=True).stdout
        if not data.startswith(b"{"):
            found.add(digest)
    return found


def _run(it: Stack, reference: str) -> None:
    output = it.run(reference, "sh", "-c", "cat /data/hello /etc/motd; ls /data/gone 2>&1; true")
    assert output.startswith(_EXPECTED)
    assert "No such file" in output


@pytest.mark.parametrize(
    "forms", [["plain"] * 3, ["estargz", "plain", "plain"], ["plain", "zstd", "plain"]]
)
def test_an_image_runs_and_containerd_has_no_layer(it: Stack, forms: list[str]) -> None:
    reference = it.push_busybox("image", forms)
    result = it.pull(reference)
    _run(it, reference)
    assert result["bytesDownloaded"] == 0
    assert _layers_in_containerd(it) == set()
    kinds = {kind for _, kind in it.containerd.snapshots(SNAPSHOTTER).values()}
    assert kinds == {"Committed"}
    again = it.pull(reference)
    assert [each["state"] for each in again["layers"]] == [
        "present" if form == "plain" else "lazy" for form in forms
    ]
    wait_until(lambda: not left_over(it), _SECONDS)


def test_the_tree_is_that_of_overlayfs(it: Stack, tmp_path: Path) -> None:
    reference = it.push_busybox("image", ["plain"] * 3, os.urandom(1 << 20))
    it.pull(reference)
    it.pull(reference, snapshotter="overlayfs")
    found = [seen(it, name, tmp_path / f"m-{name}") for name in (SNAPSHOTTER, "overlayfs")]
    found_root = [each.pop(b".") for each in found]
    assert [root["mode"] for root in found_root] == ["0755", "0755"]
    assert tree.differences(*found) == [], tree.report(tree.differences(*found))
    assert len(found[0]) > 50


def test_containers_survive_a_restart_and_removal_frees_everything(it: Stack) -> None:
    reference = it.push_busybox("image", ["plain"] * 3)
    it.pull(reference)
    it.lazysnap.kill()
    it.start_daemon()
    _run(it, reference)
    it.containerd.ctr("images", "rm", "--sync", reference)
    wait_until(lambda: not it.containerd.snapshots(SNAPSHOTTER), _SECONDS)
    wait_until(lambda: not os.listdir(it.lazysnap.root / "snapshots"), _SECONDS)


def _wrong_bytes(layer: images.Layer) -> images.Layer:
    """Another tar under the diff id of the configuration: containerd would refuse it too."""
    other = images.gzip_layer(images.tar([("evil", b"other bytes")]))
    return dataclasses.replace(layer, blob=other.blob)


def test_a_layer_of_another_diff_id_is_refused_as_by_containerd(it: Stack) -> None:
    good = [images.gzip_layer(tar) for tar in images.busybox_tars()]
    layout = images.write_layout(it.directory / "bad", [good[0], _wrong_bytes(good[1]), good[2]])
    reference = images.push(layout, it.registry.host, "bad")
    with pytest.raises(RuntimeError, match="unpacks to"):
        it.pull(reference)
    assert "which makes" in it.lazysnap.log()
    wait_until(lambda: not left_over(it), _SECONDS)


def test_what_cannot_be_unpacked_here_is_left_to_containerd(it: Stack) -> None:
    """A hard link to a file of the layer below: only containerd's own error is the pull's."""
    low = layers.plain(images.busybox_tars()[0])
    high = layers.plain(layers.make_tar([layers.hardlink("bin/linked", "bin/busybox")]))
    reference = it.push("linked", [low, high])
    with pytest.raises(RuntimeError, match=r"link"):
        it.pull(reference)
    log = it.lazysnap.log()
    assert "a layer is left to containerd" in log
    assert "No such file" in log
    wait_until(lambda: not left_over(it), _SECONDS)


def test_layers_of_other_compressions(it: Stack) -> None:
    tars = images.busybox_tars()
    kinds = [
        (images.LAYER_GZIP, gzip.compress(tars[0], 1)),
        (layers.TAR, tars[1]),
        (layers.TAR + "+zstd", zstandard.ZstdCompressor().compress(tars[2])),
    ]
    made = [
        images.Layer(blob, images.digest_of(tar), kind, {})
        for tar, (kind, blob) in zip(tars, kinds, strict=True)
    ]
    layout = images.write_layout(it.directory / "mixed", made)
    reference = images.push(layout, it.registry.host, "mixed")
    assert it.pull(reference)["bytesDownloaded"] == 0
    _run(it, reference)


def test_an_encrypted_layer_goes_to_containerd_untouched(it: Stack) -> None:
    """containerd has no decoder here, so the pull fails with its word, and nothing was tried before."""
    good = [images.gzip_layer(tar) for tar in images.busybox_tars()]
    sealed = images.Layer(os.urandom(3000), good[1].diff_id, images.LAYER_GZIP + "+encrypted", {})
    layout = images.write_layout(it.directory / "sealed", [good[0], sealed])
    reference = images.push(layout, it.registry.host, "sealed")
    with pytest.raises(RuntimeError, match=r"processor|encrypted"):
        it.pull(reference)
    assert "encrypted" in it.lazysnap.log()


def test_it_is_off_by_default(tmp_path: Path) -> None:
    with stack(tmp_path) as it:
        reference = it.push_busybox("image", ["plain"] * 3)
        result = it.pull(reference)
        assert result["bytesDownloaded"] > 0
        assert len(_layers_in_containerd(it)) == 3
        assert json.dumps(it.labels()).count("lazysnap.eager") == 0
