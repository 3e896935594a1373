# SPDX-License-Identifier: Apache-2.0
"""What clients rely on, as the sources of containers/storage have it, without any client."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fixtures.processes import alive
from lazysnap.filesystem.kernel_trees import why_not
from tests.layerstore.scene import Scene
from tests.standalone.scene import mounts_below
from tests.support import images, layers
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.podman]

_DIFF_ID = "expected-layer-diffid"


def _push(it: Scene, made: list[layers.Layer]) -> Path:
    """Push an image of these layers; its directory in the store."""
    converted = [
        images.Layer(each.blob, each.diff_id, each.media_type, each.annotations) for each in made
    ]
    layout = images.write_layout(it.directory / "made", converted)
    images.push(layout, it.registry.host, "made")
    reference = f"{it.host}/made:latest"
    return it.store.path / base64.b64encode(reference.encode()).decode()


_ENTRIES = [
    layers.directory("etc"),
    layers.file("etc/file", b"data" * 50_000, mode=0o4755, uid=7, gid=8),
    layers.symlink("etc/link", "file"),
    layers.whiteout("etc/gone"),
    layers.directory("etc/opaque"),
    layers.opaque("etc/opaque"),
    layers.file("etc/opaque/own", b"own"),
]


def test_a_layer_is_found_by_the_digest_of_its_blob(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    found = _push(it, [layer]) / layer.digest
    assert found.joinpath("diff").is_dir()
    assert not found.joinpath("diff").is_symlink()
    info = json.loads(found.joinpath("info").read_bytes())
    assert (info["diff-digest"], info["compression"]) == (layer.diff_id, 2)
    assert (info["compressed-diff-digest"], info["compressed-size"]) == (
        layer.digest,
        len(layer.blob),
    )
    assert "toc-digest" not in info
    assert found.joinpath("blob").read_bytes() == layer.blob


@pytest.mark.parametrize("dialect", ["stargz", "containers"])
def test_a_layer_is_found_by_the_digest_of_its_table_of_contents(it: Scene, dialect: str) -> None:
    layer = layers.zstd_chunked(_ENTRIES, dialect=dialect)
    names = [key for key in layer.annotations if key.endswith(("manifest-checksum", "toc.digest"))]
    store = _push(it, [layer])
    for digest in {layer.annotations[name] for name in names}:
        info = json.loads((store / digest / "info").read_bytes())
        assert info["toc-digest"] == digest
        assert info["flags"] == {_DIFF_ID: layer.diff_id}
        assert "diff-digest" not in info
        assert info["compression"] == 4
        assert (store / digest / "diff" / "etc" / "file").read_bytes() == b"data" * 50_000
        assert (store / digest / "blob").read_bytes() == layer.blob
    assert it.store.layers() == len(names)


def test_overlay_gets_marks_attributes_and_bytes(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    diff = _push(it, [layer]) / layer.digest / "diff"
    status = (diff / "etc" / "file").stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4755, 7, 8)
    assert os.readlink(diff / "etc" / "link") == "file"
    gone = (diff / "etc" / "gone").stat()
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert os.getxattr(diff / "etc" / "opaque", "trusted.overlay.opaque") == b"y"
    assert sorted(os.listdir(diff / "etc")) == ["file", "gone", "link", "opaque"]


def _served_by(diff: Path) -> str:
    """The type of the file system that a directory is on."""
    real = os.path.realpath(diff)
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {line[4]: line[line.index("-") + 1] for line in lines}.get(real, "fuse")


def test_the_kernel_serves_the_tree_of_a_layer_without_whiteouts(it: Scene) -> None:
    if why := why_not(str(it.directory)):
        pytest.skip(why)
    entries = [each for each in _ENTRIES if each.path != "etc/.wh.gone"]
    plain, hiding = layers.estargz(entries), layers.estargz(_ENTRIES)
    image = _push(it, [plain, hiding])
    diff = image / plain.digest / "diff"
    assert (image / hiding.digest / "diff").is_dir()
    assert diff.is_dir()
    wait_until(lambda: _served_by(diff) == "overlay")
    assert _served_by(image / hiding.digest / "diff") == "fuse"
    assert (diff / "etc" / "file").read_bytes() == b"data" * 50_000
    status = (diff / "etc" / "file").stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4755, 7, 8)
    assert os.getxattr(diff / "etc" / "opaque", "trusted.overlay.opaque") == b"y"
    assert os.listxattr(diff / "etc") == os.listxattr(diff / "etc" / "file") == []
    with _looking(diff.parent):
        for _ in range(3):  # each time the kernel forgets the directory
            assert _rmdir(diff.parent) == errno.ENOENT
            wait_until(lambda: diff.is_dir() and _served_by(diff) == "overlay")
        it.store.stop()
        it.store.start()
        assert _served_by(diff) == "overlay"
    assert _create(diff.parent / "use") == errno.ENOENT
    assert _create(image / hiding.digest / "use") == errno.ENOENT
    wait_until(it.store.is_empty)
    assert [
        path for path in mounts_below(it.store.root) if path != f"{it.store.root}/shards/0"
    ] == []


def _errno(call: str, path: Path) -> int:
    """With what number a call fails that another process makes."""
    script = f"import os, sys\ntry: {call}\nexcept OSError as error: sys.exit(error.errno)"
    return subprocess.run(["python3", "-c", script, path], check=False).returncode


def _create(path: Path) -> int:
    return _errno("os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC)", path)


def _rmdir(path: Path) -> int:
    return _errno("os.rmdir(sys.argv[1])", path)


def test_references_are_told_by_requests_that_fail(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    image = _push(it, [layer])
    found = image / layer.digest
    assert _create(found / "use") == errno.ENOENT
    # who used it has ended
    wait_until(it.store.is_empty)
    assert _create(found / "use") == errno.ENOENT
    assert _rmdir(found) == errno.ENOENT
    assert _rmdir(image / f"sha256:{'0' * 64}") == errno.ENOENT
    wait_until(it.store.is_empty)
    assert (found / "diff" / "etc" / "file").stat().st_size == 200_000


def test_a_layer_stays_while_a_process_looks_at_it(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    found = _push(it, [layer]) / layer.digest
    with _looking(found):
        assert not it.store.is_empty()
        assert it.store.layers() == 1
    wait_until(it.store.is_empty)


@contextmanager
def _looking(found: Path) -> Iterator[None]:
    """A process that uses a layer, until it is killed."""
    words = ["sh", "-c", f"true >{found}/use; echo 1; read line"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        try:
            yield
        finally:
            process.kill()


def test_references_of_a_storage_that_is_not_seen_are_counted(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    found = _push(it, [layer]) / layer.digest
    place = it.directory / "elsewhere"
    place.mkdir()
    script = f"""
        mount -t tmpfs none {place} && mkdir {place}/overlay-layers || exit 1
        exec 3>{place}/overlay-layers/layers.lock
        true >{found}/use; true >{found}/use; rmdir {found}; echo ready; read line
    """
    words = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    it.store.stop()
    it.store.start()
    assert _create(found / "use") == errno.ENOENT
    assert not it.store.is_empty()
    assert _rmdir(found) == errno.ENOENT
    wait_until(it.store.is_empty)


def test_nothing_else_can_be_written(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    found = _push(it, [layer]) / layer.digest
    assert _create(found / "diff" / "new") == errno.EROFS
    assert _create(found / "other") == errno.EROFS
    assert _errno("os.open(sys.argv[1], os.O_WRONLY)", found / "info") == errno.EROFS
    assert _rmdir(found / "diff" / "etc" / "opaque") == errno.EROFS
    calls = ["mkdir(p + '/x')", "unlink(p + '/etc/link')", "chmod(p, 0)", "utime(p)"]
    calls += ["rename(p + '/etc', p + '/x')", "symlink('x', p + '/x')", "mkfifo(p + '/x')"]
    calls += ["link(p + '/etc/file', p + '/x')", "setxattr(p, 'user.x', b'x')"]
    for call in calls:
        assert _errno(f"p = sys.argv[1]; os.{call}", found / "diff") == errno.EROFS, call
    assert (found / "diff" / "etc" / "file").read_bytes() == b"data" * 50_000


@pytest.mark.parametrize(
    "name", ["sha256:" + "0" * 64, "sha256:xyz", "diff", "x" * 200, "sha512:" + "0" * 128]
)
def test_what_is_not_there_is_not_found(it: Scene, name: str) -> None:
    layer = layers.estargz(_ENTRIES)
    image = _push(it, [layer])
    with pytest.raises(FileNotFoundError):
        os.stat(image / name)
    with pytest.raises(FileNotFoundError):
        os.stat(it.store.path / "not base64!")
    with pytest.raises(FileNotFoundError):
        os.stat(it.store.path / base64.b64encode(b"no//reference").decode() / layer.digest)
    with pytest.raises(FileNotFoundError):
        os.stat(it.store.path / base64.b64encode(b"oci:/etc").decode() / layer.digest)
    assert os.listdir(it.store.path) == os.listdir(image) == []


def test_a_blob_that_the_registry_has_damaged_is_an_error(it: Scene) -> None:
    layer = layers.estargz(_ENTRIES)
    found = _push(it, [layer]) / layer.digest
    assert found.joinpath("diff").is_dir()
    hexadecimal = layer.digest.split(":")[1]
    (stored,) = it.directory.glob(f"storage/**/{hexadecimal}/data")
    data = bytearray(stored.read_bytes())
    data[20] ^= 1
    stored.write_bytes(data)
    with pytest.raises(OSError, match="Input/output error"):
        found.joinpath("blob").read_bytes()
    stored.write_bytes(layer.blob)
    assert found.joinpath("blob").read_bytes() == layer.blob


def test_a_blob_is_read_on_when_the_worker_is_replaced(it: Scene) -> None:
    layer = layers.estargz([layers.file("big", os.urandom(3 << 20))])
    found = _push(it, [layer]) / layer.digest
    with found.joinpath("blob").open("rb", buffering=0) as file:
        hasher = hashlib.sha256(file.read(1000))
        worker = it.store.who()["pid"]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not alive(worker))
        while data := file.read(1 << 16):
            hasher.update(data)
    assert f"sha256:{hasher.hexdigest()}" == layer.digest


def test_a_tag_that_moves_is_asked_for_again(it: Scene) -> None:
    first = layers.estargz([layers.file("a", b"first")])
    image = _push(it, [first])
    assert (image / first.digest / "diff" / "a").read_bytes() == b"first"
    second = layers.estargz([layers.file("a", b"second")])
    layout = images.write_layout(
        it.directory / "moved",
        [images.Layer(second.blob, second.diff_id, second.media_type, second.annotations)],
    )
    images.push(layout, it.registry.host, "made")
    wait_until(lambda: (image / second.digest).exists())
    assert (image / second.digest / "diff" / "a").read_bytes() == b"second"
    assert (image / first.digest / "diff" / "a").read_bytes() == b"first"
