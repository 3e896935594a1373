# SPDX-License-Identifier: Apache-2.0
"""The parts that other tests rely on to notice a difference must notice it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tarfile
import threading
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fixtures.images import cache, debian, oci
from fixtures.processes import FixtureError, daemon, kill_leftovers, unmount_below
from fixtures.proxy import counting_proxy
from tests.support import odd_images, tar_entries, tree


def _sample(root: Path) -> Path:
    (root / "sub").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    (root / "other").write_bytes(b"content")
    os.link(root / "file", root / "sub" / "linked")
    (root / "symlink").symlink_to("file")
    (root / "sub" / os.fsdecode(b"latin-\xe4")).write_bytes(b"")
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(10**18, 10**18 + 1), follow_symlinks=False)
    return root


def _resize(root: Path) -> None:
    (root / "other").write_bytes(b"Content")
    os.utime(root / "other", ns=(10**18, 10**18 + 1))


def _relink(root: Path) -> None:
    """The same number of links and the same content, but of another pair of files."""
    (root / "sub" / "linked").unlink()
    (root / "file").rename(root / "f")
    (root / "other").rename(root / "file")
    (root / "f").rename(root / "other")
    os.link(root / "other", root / "sub" / "linked")
    os.utime(root, ns=(10**18, 10**18 + 1))
    os.utime(root / "sub", ns=(10**18, 10**18 + 1))


CHANGES = {
    "content": (_resize, {(b"other", "sha256")}),
    "mode": (lambda root: (root / "other").chmod(0o600), {(b"other", "mode")}),
    "time by one nanosecond": (
        lambda root: os.utime(root / "other", ns=(0, 10**18)),
        {(b"other", "mtime")},
    ),
    "time of a link": (
        lambda root: os.utime(root / "symlink", ns=(0, 0), follow_symlinks=False),
        {(b"symlink", "mtime")},
    ),
    "attribute": (lambda root: os.setxattr(root / "sub", "user.x", b"\0"), {(b"sub", "xattr:user.x")}),
    "links": (
        _relink,
        {(b"file", "nlink"), (b"file", "same"), (b"other", "nlink"), (b"other", "same"),
         (b"sub/linked", "same")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_single_change_is_the_only_difference(tmp_path: Path, name: str) -> None:
    change, expected = CHANGES[name]
    left, right = _sample(tmp_path / "left"), _sample(tmp_path / "right")
    assert tree.dump_tree(str(left)) == tree.dump_tree(str(right))

    change(right)

    found = tree.differences(tree.read_tree(str(left)), tree.read_tree(str(right)))
    assert {(one.path, one.field) for one in found} == expected
    assert tree.dump_tree(str(left)) != tree.dump_tree(str(right))


def test_dump_agrees_with_find(tmp_path: Path) -> None:
    root = _sample(tmp_path / "tree")
    lines = subprocess.run(
        ["find", ".", "-printf", "%p %m %U %G %n\\0"], cwd=root, capture_output=True, check=True
    ).stdout.split(b"\0")[:-1]
    expected = {}
    for line in lines:
        path, mode, uid, gid, links = line.rsplit(b" ", 4)
        expected[path.removeprefix(b"./")] = (int(mode, 8), int(uid), int(gid), int(links))
    found = {
        path: (int(one["mode"], 8), int(one["uid"]), int(one["gid"]), int(one["nlink"]))
        for path, one in tree.read_tree(str(root)).items()
    }
    assert found == expected


def test_report_counts_and_limits() -> None:
    found = [tree.Difference(b"p\xff%d" % n, "mode", "1", "2") for n in range(5)]
    text = tree.report(found, limit=2)
    assert text.splitlines() == [
        "5 differences: mode 5",
        "p\\xff0: mode: 1 != 2",
        "p\\xff1: mode: 1 != 2",
        "... and 3 more",
    ]


@pytest.mark.root
def test_gnu_tar_extracts_what_the_odd_writer_wrote(tmp_path: Path) -> None:
    """GNU tar is the judge of names, attributes, links and times in our PAX headers."""
    entries = [
        *odd_images.ODD["modes"][1](), *odd_images.ODD["links"][1](), *odd_images.ODD["names"][1](),
        *odd_images.ODD["bytes-names"][1](), *odd_images.ODD["times"][1](),
    ]  # fmt: skip

    def fill(archive: tarfile.TarFile) -> None:
        for entry in entries:
            tar_entries.add_entry(archive, entry)

    layer = oci.write_layer(tmp_path / "oci", fill)
    out = tmp_path / "out"
    out.mkdir()
    blob = tmp_path / "oci/blobs/sha256" / layer.digest.removeprefix("sha256:")
    subprocess.run(
        ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xzpf", blob, "-C", out],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    found = tree.read_tree(str(out))
    for entry in entries:
        got = found[entry.name]
        assert int(got["mode"], 8) == entry.mode, entry.name
        assert (int(got["uid"]), int(got["gid"])) == (entry.uid, entry.gid), entry.name
        if entry.kind != tarfile.DIRTYPE:
            assert int(got["mtime"]) == entry.mtime, entry.name
        wanted = {
            # The kernel shows revision 2 capabilities as they were set, magic and all.
            f"xattr:{name}": f"0x{value.hex()}"
            for name, value in entry.xattrs.items()
        }
        assert {k: v for k, v in got.items() if k.startswith("xattr:")} == wanted, entry.name
    assert found[b"third"]["same"] == found[b"x/first"]["same"]
    got_caps = subprocess.run(
        ["getcap", out / "ping"], capture_output=True, text=True, check=True
    ).stdout
    assert got_caps.strip() == f"{out / 'ping'} cap_net_raw=ep"


@pytest.mark.parametrize("name", ["links", "twice", "dotted"])
def test_layouts_are_reproducible_and_accepted_by_skopeo(tmp_path: Path, name: str) -> None:
    first = odd_images.write_layout(tmp_path / "first", odd_images.ODD[name])
    second = odd_images.write_layout(tmp_path / "second", odd_images.ODD[name])
    assert first == second
    told = subprocess.run(
        ["skopeo", "inspect", f"oci:{tmp_path / 'first'}:plain"], capture_output=True, check=True
    ).stdout
    seen = json.loads(told)
    assert seen["Digest"] == first
    assert len(seen["Layers"]) == len(odd_images.ODD[name])


@pytest.mark.root
def test_stage_layer_says_what_overlayfs_holds(tmp_path: Path) -> None:
    """Whiteouts, opaque directories and hard links become OCI's; overlayfs' own marks do not leak."""
    changes = tmp_path / "fs"
    (changes / "kept").mkdir(parents=True)
    os.mknod(changes / "kept" / "gone", 0o020000, 0)
    (changes / "hidden").mkdir()
    os.setxattr(changes / "hidden", "trusted.overlay.opaque", b"y")
    os.setxattr(changes / "kept", "trusted.overlay.impure", b"y")
    os.setxattr(changes / "kept", "user.mine", b"\xff")
    (changes / "hidden" / "a").write_bytes(b"a")
    os.link(changes / "hidden" / "a", changes / "kept" / "b")

    layer = oci.write_layer(tmp_path / "oci", partial(debian.add_tree, root=changes))

    blob = tmp_path / "oci/blobs/sha256" / layer.digest.removeprefix("sha256:")
    with gzip.open(blob) as plain, tarfile.open(fileobj=plain, errors="surrogateescape") as archive:
        members = {one.name: one for one in archive}
    assert set(members) == {
        "hidden", "hidden/.wh..wh..opq", "hidden/a", "kept", "kept/.wh.gone", "kept/b",
    }  # fmt: skip
    assert members["kept/b"].islnk()
    assert members["kept/b"].linkname == "hidden/a"
    assert members["kept/.wh.gone"].isreg()
    assert members["kept/.wh.gone"].size == 0
    assert not any("trusted" in key for one in members.values() for key in one.pax_headers)
    assert members["kept"].pax_headers["SCHILY.xattr.user.mine"] == "\udcff"


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def broken(new: Path) -> None:
        (new / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.locked(tmp_path):
        cache.directory(tmp_path / "thing", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]

    (tmp_path / "new-killed").mkdir()  # a builder that was killed could not clean up
    with cache.locked(tmp_path):
        cache.directory(tmp_path / "thing", lambda new: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "thing"]


def test_proxy_counts_what_passes() -> None:
    body = os.urandom(300_000)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with counting_proxy(server.server_port) as counter:
                for _ in range(3):
                    with urllib.request.urlopen(f"http://127.0.0.1:{counter.port}/") as answer:
                        assert answer.read() == body
                assert counter.requests == 3
                assert 3 * len(body) < counter.received < 3 * len(body) + 3000
        finally:
            server.shutdown()
            thread.join()


def test_daemon_that_ends_early_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(FixtureError, match="no such flag"),
        daemon(["sh", "-c", "echo no such flag; exit 3"], tmp_path / "log", lambda: False),
    ):
        pytest.fail("it never was ready")


@pytest.mark.root
def test_leftovers_are_found_by_their_directory_only(tmp_path: Path) -> None:
    work, others = tmp_path / "work", tmp_path / "work-of-others"
    for path in (work, others):
        path.mkdir()
    (work / "mount point").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work / "mount point"], check=True)
    program = "import sys; print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(["python3", "-c", program, work / "x"], stdin=pipe, stdout=pipe) as mine,
        subprocess.Popen(
            ["python3", "-c", program, others / "x"], stdin=pipe, stdout=pipe
        ) as not_mine,
    ):
        assert mine.stdout is not None
        assert not_mine.stdout is not None
        mine.stdout.readline()
        not_mine.stdout.readline()
        assert kill_leftovers(work) == [mine.pid]
        assert unmount_below(work) == [str(work / "mount point")]
        assert not os.path.ismount(work / "mount point")
        assert not_mine.poll() is None
        assert not_mine.stdin is not None
        not_mine.stdin.close()
