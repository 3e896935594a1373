# SPDX-License-Identifier: Apache-2.0
"""Trees that the kernel serves: what reaches a shard, what goes on without one, what writers see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap import mounts
from lazysnap.filesystem.kernel_trees import clean, why_not
from tests.support import layers
from tests.support.stack import SNAPSHOTTER, Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]
_EAGER = "[fetch]\nbackground_delay_seconds = 0.1\n"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path, config=_EAGER) as it:
        yield it


def _top(it: Stack) -> str:
    found = it.containerd.snapshots(SNAPSHOTTER)
    parents = {parent for parent, _ in found.values()}
    (top,) = [key for key, (_, kind) in found.items() if kind == "Committed" and key not in parents]
    return top


def _types(it: Stack, directory: str) -> set[str]:
    below = mounts.mounted_below(str(it.lazysnap.root / directory))
    return {point.fstype for point in below}


def _requests(it: Stack, kind: str) -> int:
    return sum(it.lazysnap.call(n, "ping")["requests"].get(kind, 0) for n in it.lazysnap.shards())


def _everything_is_settled(it: Stack) -> bool:
    found = [s for n in it.lazysnap.shards() for s in it.lazysnap.call(n, "status")]
    cache = it.lazysnap.root / "cache"
    local = all(layer["local_bytes"] == layer["bytes"] for layer in found)
    return local and not any(cache.glob("aside/??/*"))


def _contents(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_this_machine_can_do_it(tmp_path: Path) -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert bool(why_not(str(tmp_path))) == (release < (6, 12))
    assert mounts.mounted_below(str(tmp_path)) == []
    assert os.listdir(tmp_path) == []


def test_what_a_killed_try_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "new-probe-abc"
    (left / "tree").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(left / "tree")], check=True)
    clean(str(tmp_path))
    assert mounts.mounted_below(str(tmp_path)) == []
    assert os.listdir(tmp_path) == []


def test_names_and_attributes_do_not_reach_a_shard(it: Stack) -> None:
    reference = it.push_busybox("lazy", ["estargz"] * 3)
    it.pull(reference)
    it.run(reference, "true")
    assert _types(it, "snapshots") == {"erofs"}
    assert _types(it, "merged") == {"overlay"}
    before = [_requests(it, kind) for kind in ("lookup", "getattr", "readdir", "getxattr")]
    it.run(reference, "sh", "-c", "find / -xdev -ls >/dev/null; true")
    after = [_requests(it, kind) for kind in ("lookup", "getattr", "readdir", "getxattr")]
    # busybox itself is looked up by its content again, as it may be an object now
    assert sum(after) - sum(before) <= 12


def test_what_is_local_is_read_without_any_process_of_ours(it: Stack) -> None:
    reference = it.push_busybox("lazy", ["estargz", "zstd", "estargz"], os.urandom(3_000_000))
    it.pull(reference)
    wait_until(lambda: _everything_is_settled(it))
    view = it.directory / "view"
    it.mount("view", view, _top(it))
    it.lazysnap.kill()
    it.lazysnap.kill_shards()
    found = _contents(view)
    assert found["data/hello"] == b"hello from the top layer\n"
    assert len(found["data/payload"]) == 3_000_000
    assert found["bin/busybox"] == Path("/bin/busybox").read_bytes()


def test_a_writer_finds_an_ordinary_overlay(it: Stack) -> None:
    reference = it.push_busybox("lazy", ["estargz"] * 3)
    it.pull(reference)
    snapshots = ("snapshots", "--snapshotter", SNAPSHOTTER)
    it.containerd.ctr(*snapshots, "prepare", "active", _top(it))
    target = it.directory / "active"
    target.mkdir()
    command = it.containerd.ctr(*snapshots, "mounts", str(target), "active")
    subprocess.run(["sh", "-ec", command], check=True)
    (target / "data/hello").chmod(0o600)
    (point,) = mounts.mounted_below(str(target))
    options = dict(o.split("=", 1) for o in point.super_options.split(",") if "=" in o)
    upper = Path(options["upperdir"])
    assert options.get("metacopy", "off") == "off"
    assert (upper / "data/hello").read_bytes() == b"hello from the top layer\n"
    assert os.listxattr(upper / "data/hello") in ([], ["trusted.overlay.origin"])
    with pytest.raises(OSError, match="Invalid cross-device link"):
        os.rename(target / "data", target / "other")


def test_a_shard_that_was_mounted_anew_is_used_by_the_next_container(it: Stack) -> None:
    payload = os.urandom(200_000)
    reference = it.push("lazy", [layers.estargz([layers.file("x", payload)]), *_shell()])
    it.lazysnap.stop()
    it.lazysnap.configure("[fetch]\nbackground = false\n")
    it.start_daemon()
    it.pull(reference)
    assert it.run(reference, "wc", "-c", "/bin/busybox")
    it.lazysnap.kill_shards()
    assert it.run(reference, "sh", "-c", "wc -c < /x") == "200000\n"


def _shell() -> list[layers.Layer]:
    entries = [
        layers.file("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
        *(layers.symlink(f"bin/{name}", "busybox") for name in ("sh", "wc", "cat", "true")),
    ]
    return [layers.estargz(entries)]


@pytest.mark.parametrize("kernel_trees", ["true", "false"])
def test_a_daemon_with_another_setting_takes_over(it: Stack, kernel_trees: str) -> None:
    other = "false" if kernel_trees == "true" else "true"
    it.lazysnap.stop()
    it.lazysnap.configure(f"[lazy]\nkernel_trees = {kernel_trees}\n")
    it.start_daemon()
    reference = it.push_busybox("lazy", ["estargz", "plain", "zstd"])
    it.pull(reference)
    assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"
    it.lazysnap.stop()
    it.lazysnap.configure(f"[lazy]\nkernel_trees = {other}\n")
    it.start_daemon()
    assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"
