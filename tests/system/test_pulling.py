# SPDX-License-Identifier: Apache-2.0
"""Images of every kind, pulled through the whole stack and run: what is lazy, and why the rest is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, layers
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

_EXPECTED = "hello from the top layer\nlazysnap test image\n"
_REASON = "containerd.io/snapshot/lazysnap.reason"
_REMOTE = "containerd.io/snapshot/remote"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as it:
        yield it


def _layer_labels(it: Stack) -> list[dict[str, str]]:
    """Labels of the committed snapshots, bottom first."""
    committed = {
        key: parent
        for key, (parent, kind) in it.containerd.snapshots("lazysnap").items()
        if kind == "Committed"
    }
    labels = it.labels()
    chain = [""]
    while above := [key for key, parent in committed.items() if parent == chain[-1]]:
        (key,) = above
        chain.append(key)
    return [labels[key] for key in chain[1:]]


@pytest.mark.parametrize(
    ("forms", "lazy"),
    [
        (["estargz", "estargz", "estargz"], [True, True, True]),
        (["zstd", "zstd-containers", "estargz"], [True, True, True]),
        (["plain", "plain", "plain"], [False, False, False]),
        (["estargz", "plain", "estargz"], [True, False, True]),
        (["plain", "estargz", "plain"], [False, True, False]),
    ],
)
def test_an_image_runs_and_says_why_a_layer_is_not_lazy(
    it: Stack, forms: list[str], lazy: list[bool]
) -> None:
    reference = it.push_busybox("image", forms)
    it.pull(reference)
    assert it.run(reference, "sh", "-c", "cat /data/hello /etc/motd") == _EXPECTED
    labels = _layer_labels(it)
    assert [_REMOTE in each for each in labels] == lazy
    assert [each.get(_REASON) for each in labels] == [
        None if each else "no-toc-digest" for each in lazy
    ]
    assert it.lazysnap.log().count("remote-snapshot-prepared=false") == lazy.count(False)


def test_lazy_layers_are_not_downloaded(it: Stack) -> None:
    reference = it.push_busybox("image", ["estargz"] * 3)
    it.pull(reference)
    media_types = {
        it.containerd.ctr("content", "get", digest)[:1] for digest in it.containerd.contents()
    }
    assert media_types == {"{"}  # manifest and config only


def test_a_second_pull_downloads_and_mounts_nothing_again(it: Stack) -> None:
    reference = it.push_busybox("image", ["estargz", "plain", "estargz"])
    it.pull(reference)
    before = it.containerd.snapshots("lazysnap"), it.containerd.contents()
    it.pull(reference)
    assert (it.containerd.snapshots("lazysnap"), it.containerd.contents()) == before


def test_removing_an_image_leaves_nothing(it: Stack) -> None:
    reference = it.push_busybox("image", ["estargz", "zstd", "plain"])
    it.pull(reference)
    it.run(reference, "true")
    it.containerd.ctr("images", "rm", "--sync", reference)
    assert it.containerd.snapshots("lazysnap") == {}
    root = it.lazysnap.root
    assert list((root / "slots").iterdir()) == []
    mounts = Path("/proc/self/mountinfo").read_text()
    assert f"{root}/snapshots/" not in mounts


def test_ctr_remote_rpull_is_understood(it: Stack) -> None:
    reference = it.push_busybox("image", ["estargz"] * 3)
    done = it.containerd.command("images", "rpull", "--plain-http", "--snapshotter", "lazysnap")
    subprocess.run(["ctr-remote", *done[1:], reference], check=True, capture_output=True)
    assert it.run(reference, "sh", "-c", "cat /data/hello /etc/motd") == _EXPECTED
    assert all(_REMOTE in each for each in _layer_labels(it))


def test_a_layer_that_cannot_be_verified_is_downloaded(it: Stack) -> None:
    made = [layers.estargz(tar) for tar in images.busybox_tars()]
    made[1].annotations.clear()
    made[2].annotations["containerd.io/snapshot/stargz/toc.digest"] = "sha256:" + "0" * 64
    reference = it.push("image", made)
    it.pull(reference)
    assert it.run(reference, "sh", "-c", "cat /data/hello /etc/motd") == _EXPECTED
    reasons = [each.get(_REASON) for each in _layer_labels(it)]
    assert reasons == [None, "no-toc-digest", "digest-mismatch"]


def test_a_tampered_chunk_is_an_error_and_not_wrong_bytes(it: Stack) -> None:
    # Longer than the tail of the blob that came with the table of contents.
    payload = random.Random(3).randbytes(1 << 20)
    made = [layers.estargz(tar) for tar in images.busybox_tars(payload)]
    reference = it.push("image", made)
    it.lazysnap.stop()
    it.lazysnap.configure("[fetch]\nbackground = false\n")
    it.start_daemon()
    it.pull(reference)
    # The registry's copy changes after the table of contents was read, and before anything else is.
    for path in (it.directory).glob("**/blobs/sha256/*/*/data"):
        blob = bytearray(path.read_bytes())
        if bytes(blob) == made[1].blob:
            for at in range(64, made[1].toc_offset, 97):
                blob[at] ^= 0x55
            path.write_bytes(blob)
    with pytest.raises(RuntimeError, match=r"I/O error|Input/output error"):
        it.run(reference, "cat", "/data/payload")
    assert "reading failed" in it.lazysnap.log()


def test_the_daemon_pulls_an_image_that_is_lazy(it: Stack) -> None:
    reference = it.push_busybox("image", ["estargz", "zstd", "estargz"])
    result = it.pull(reference, delegated=True)
    assert [layer["state"] for layer in result["layers"]] == ["lazy"] * 3
    assert (result["lazyLayers"], result["bytesDownloaded"]) == (3, 0)
    assert it.lazysnap.log().count("image pulled for a command") == 1
    assert it.run(reference, "sh", "-c", "cat /data/hello /etc/motd") == _EXPECTED
    delegated = (
        it.containerd.snapshots("lazysnap"),
        it.containerd.contents(),
        it.containerd.images(),
    )
    assert it.containerd.leases() == []
    assert it.pull(reference)["layers"] == result["layers"]
    assert it.lazysnap.log().count("image pulled for a command") == 1
    own = it.containerd.snapshots("lazysnap"), it.containerd.contents(), it.containerd.images()
    assert delegated == own


@pytest.mark.parametrize("wrong", ["plain", "digest"])
def test_the_daemon_leaves_to_the_command_what_is_not_lazy(it: Stack, wrong: str) -> None:
    made = [layers.estargz(tar) for tar in images.busybox_tars()]
    if wrong == "plain":
        made[2].annotations.clear()
    else:  # which shows when the layer is prepared
        made[2].annotations["containerd.io/snapshot/stargz/toc.digest"] = "sha256:" + "0" * 64
    reference = it.push("image", made)
    result = it.pull(reference, delegated=True)
    assert [layer["state"] for layer in result["layers"]] == ["lazy", "lazy", "unpacked"]
    assert "image pulled for a command" not in it.lazysnap.log()
    assert it.run(reference, "sh", "-c", "cat /data/hello /etc/motd") == _EXPECTED
    assert it.containerd.leases() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_the_daemon_pulls(it: Stack, number: signal.Signals, code: int) -> None:
    made = [layers.estargz(tar) for tar in images.busybox_tars()]
    reference = it.push("image", made)
    # containerd waits for a layer that nobody can read, while the lowest one is there already.
    blobs = {path.read_bytes(): path for path in it.directory.glob("**/blobs/sha256/*/*/data")}
    upper = blobs[made[1].blob]
    upper.unlink()
    os.mkfifo(upper)
    command = [sys.executable, "-m", "lazysnap", "pull", reference, "--json"]
    places = ["--address", it.containerd.address, "--root", str(it.lazysnap.root)]
    with subprocess.Popen([*command, *places], stdout=subprocess.PIPE) as process:
        wait_until(lambda: len(it.containerd.snapshots("lazysnap")) == 1)
        process.send_signal(number)
        assert process.wait(120) == code
    assert it.containerd.snapshots("lazysnap") == {}
    assert it.containerd.leases() == []
    assert it.containerd.images() == {}
    assert it.containerd.contents() == {}
