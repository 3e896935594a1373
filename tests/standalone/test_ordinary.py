# SPDX-License-Identifier: Apache-2.0
"""What an ordinary user mounts: by fusermount3, and in user namespaces."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.images import catalogue
from fixtures.processes import alive
from fixtures.registry import Registry, registry
from tests.standalone.ordinary import WAYS, OrdinaryScene, ordinary_scene
from tests.standalone.scene import SECONDS, layout, scene
from tests.support import odd_images, tree
from tests.support.stack import wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse]

_PAYLOAD = os.urandom(3_000_000)
_SUM = hashlib.sha256(_PAYLOAD).hexdigest()


@pytest.fixture(params=WAYS)
def it(request: pytest.FixtureRequest) -> Iterator[OrdinaryScene]:
    with ordinary_scene(request.param) as found:
        yield found


@pytest.fixture(params=["fusermount", "one id"])
def killed(request: pytest.FixtureRequest) -> Iterator[OrdinaryScene]:
    with ordinary_scene(request.param) as found:
        yield found


@pytest.fixture
def by_fuse() -> Iterator[OrdinaryScene]:
    with ordinary_scene("fusermount") as found:
        yield found


def _look(it: OrdinaryScene, point: Path) -> None:
    assert it.call("cat", point / "data/hello") == b"hello from the top layer\n"
    assert it.names(point / "data") == ["hello", "many", "payload"]
    assert it.call("sha256sum", point / "data/payload").decode().split()[0] == _SUM


def test_layers_of_all_kinds_make_one_tree(it: OrdinaryScene) -> None:
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    other = it.new_point()
    assert [layer["state"] for layer in it.mount(f"oci:{made.path}")] == [
        *("lazy", "unpacked", "lazy"),
    ]
    it.mount(f"oci:{made.path}", "--writable", point=other)
    _look(it, it.point)
    assert it.run("umount", it.directory / "home").returncode == 0  # nothing is mounted there
    it.call("sh", "-ec", f"cd {other}/data; echo new >hello; rm many/001; rm payload; mkdir d")
    assert it.names(other / "data") == ["d", "hello", "many"]
    _look(it, it.point)
    assert it.umount()
    assert it.call("cat", other / "data/hello") == b"new\n"
    assert it.umount(point=other)
    it.assert_clean()
    assert not it.umount()
    # What the user cannot remove would have to be removed by root.
    it.call("rm", "-r", it.root)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    storage = catalogue.DEFAULT_ROOT / "registry"
    storage.mkdir(parents=True, exist_ok=True)
    with registry(storage, tmp_path_factory.mktemp("registry"), readonly=True) as found:
        yield found


def _allowed(one: tree.Difference, expected: tree.Tree, start: int) -> bool:
    """Whether something may differ from what root mounts."""
    kind = expected[one.path]["type"] if one.path in expected else ""
    # Who may not make devices leaves them out where it unpacks.
    if one.field == "exists":
        return one.right == "" and kind in ("char", "block")
    # No layer has the top, nor the directories that were made when this was unpacked.
    if one.field == "mtime":
        return one.path == b"." or min(int(one.left), int(one.right)) > start
    # fuse-overlayfs counts the directories in a directory, and overlay does not.
    return one.field == "nlink" and kind == "dir"


def _visible(found: tree.Tree) -> dict[bytes, dict[str, str]]:
    """Without the names of whiteouts that hide nothing, which overlay lists."""
    return {path: dict(fields) for path, fields in found.items() if fields["type"] != "listed only"}


def _compare(it: OrdinaryScene, reference: str) -> None:
    """The user sees what root sees, but for who owns it."""
    start = time.time_ns()
    with scene(it.directory / "by-root") as by_root:
        by_root.mount(reference, "--plain-http")
        expected = _visible(tree.read_tree(str(by_root.point)))
    for fields in expected.values():
        for name in ("uid", "gid"):
            fields[name] = str(it.owner(int(fields[name])))
    it.mount(reference, "--plain-http")
    seen = _visible(it.tree(it.point))
    found = [one for one in tree.differences(expected, seen) if not _allowed(one, expected, start)]
    assert len(expected) > 3
    assert not found, tree.report(found)
    assert it.umount()
    it.assert_clean()
    it.call("rm", "-r", it.root)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "esgz"])
def test_debian(it: OrdinaryScene, server: Registry, form: str) -> None:
    image = catalogue.build("py", ["plain", "esgz"], say=lambda line: None)
    _compare(it, f"{server.host}/{image.repository}:{form}")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "esgz"])
@pytest.mark.parametrize("name", ["whiteouts", "parents", "replaced"])
def test_odd_images(it: OrdinaryScene, server: Registry, name: str, form: str) -> None:
    image = odd_images.built(name, ["plain", "esgz"])
    _compare(it, f"{server.host}/{image.repository}:{form}")


def test_what_the_user_may_not_read_goes_with_the_mount(
    by_fuse: OrdinaryScene, server: Registry
) -> None:
    it = by_fuse
    image = odd_images.built("modes", ["plain"])
    found = it.mount(f"{server.host}/{image.repository}:plain", "--plain-http")
    assert {layer["state"] for layer in found} == {"unpacked"}
    closed = [
        path for path in (it.root / "snapshots").rglob("*/") if not path.stat().st_mode & 0o700
    ]
    assert closed
    assert it.umount()
    it.assert_clean()


# -- what ends in the middle ----------------------------------------------------------------------


@pytest.mark.slow
def test_mount_is_killed(killed: OrdinaryScene) -> None:
    it = killed
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    arguments = ("mount", f"oci:{made.path}", it.point)
    whole = it.crash(0, *arguments)
    assert whole.returncode == 0, whole.stderr
    it.umount()
    it.assert_clean()
    count = int(whole.stdout.splitlines()[-1])
    died = 0
    # The last ones are about what others see.
    steps = {1 + count * n // 6 for n in range(6)} | {count - n for n in range(4)}
    for step in sorted(steps):
        done = it.crash(step, *arguments)
        died += done.returncode != 0
        it.umount()
        it.assert_clean()
    assert died > len(steps) // 2
    it.mount(f"oci:{made.path}")
    _look(it, it.point)
    it.umount()
    it.assert_clean()


def _end(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_readers_do_not_notice_that_a_worker_was_killed(killed: OrdinaryScene) -> None:
    it = killed
    made = layout(it.directory / "layout", ["estargz"] * 3, _PAYLOAD)
    it.mount(f"oci:{made.path}")
    _end(it.workers())
    _look(it, it.point)
    it.umount()
    it.assert_clean()


def test_umount_after_everything_was_killed(killed: OrdinaryScene) -> None:
    it = killed
    made = layout(it.directory / "layout", ["estargz", "plain", "zstd"], _PAYLOAD)
    it.mount(f"oci:{made.path}")
    _end(it.processes())
    assert it.umount()
    it.assert_clean()
    it.mount(f"oci:{made.path}")
    _look(it, it.point)
    it.umount()
    it.assert_clean()


def test_a_mount_point_that_is_used_stays(by_fuse: OrdinaryScene) -> None:
    it = by_fuse
    made = layout(it.directory / "layout", ["estargz"] * 3, _PAYLOAD)
    it.mount(f"oci:{made.path}")
    script = f"exec 3<{it.point}/data/payload; echo ready; read line; sha256sum <&3"
    reader = subprocess.Popen(
        [*it.before, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    done = it.run("umount", it.point)
    assert done.returncode != 0
    assert "--lazy" in done.stderr
    assert reader.communicate("\n", timeout=SECONDS)[0].split()[0] == _SUM
    assert it.umount("--lazy")
    it.assert_clean()


# -- what is refused ------------------------------------------------------------------------------


def _refused(it: OrdinaryScene) -> str:
    """Try to mount; what is said of it."""
    done = it.run("mount", "oci:/nothing", it.point)
    assert done.returncode not in (0, 130)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_missing_is_named(by_fuse: OrdinaryScene) -> None:
    it = by_fuse
    programs = it.directory / "programs"
    programs.mkdir()
    it.before = [*it.before, f"PATH={programs}"]
    assert "install the package fuse3" in _refused(it)
    (programs / "fusermount3").write_text("#!/bin/sh\n")
    (programs / "fusermount3").chmod(0o755)
    assert f"chmod u+s {programs}/fusermount3" in _refused(it)
    (programs / "fusermount3").unlink()
    (programs / "fusermount3").symlink_to(str(shutil.which("fusermount3")))
    said = _refused(it)
    assert "install the package fuse-overlayfs" in said
    assert "unshare --user --map-root-user --mount" in said
    subprocess.run([*it.as_root, "chmod", "600", "/dev/fuse"], check=True)
    assert "chmod 666 /dev/fuse" in _refused(it)
    assert not it.root.exists()


def test_a_mount_point_that_is_not_the_users(by_fuse: OrdinaryScene) -> None:
    it = by_fuse
    made = layout(it.directory / "layout", ["estargz"] * 3, _PAYLOAD)
    os.chown(it.point, 0, 0)
    done = it.run("mount", f"oci:{made.path}", it.point)
    assert done.returncode != 0
    assert "write access" in done.stderr
    it.assert_clean()
