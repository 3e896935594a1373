# SPDX-License-Identifier: Apache-2.0
"""What `lazysnap.shard` lists as kept between releases.

`earlier/` was made at commit db3b33d: `keeper.py.txt` is `lazysnap/shard/keeper.py`, and `root.tar.xz` is
the root of a shard that has served one layer with `etc/hello` and `link`, with a database that names it.
Neither is ever made anew: a test that fails here shows what an upgrade would break on a node.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import lazysnap
from lazysnap.cache import Cache
from lazysnap.fetch.coverage import is_complete
from lazysnap.layers.slots import Inherited, SlotRecord, read_slot
from lazysnap.layers.tree_image_file import read_tree
from lazysnap.layers.tree_images import tree_name
from lazysnap.layers.view import open_index
from lazysnap.overlay import Kind
from lazysnap.prefetch.profile import Read
from lazysnap.prefetch.profile_store import ProfileStore
from lazysnap.shard import content_view, keeper, operations, store_view, worker
from lazysnap.shard.calls import WorkerCalls
from lazysnap.shard.settings import FIRST_XATTR_SHARD, read_settings
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.supervisor import Supervisor
from tests.shard.scene import NUMBER, Shard, shard

_EARLIER = Path(__file__).parent / "earlier"
_HELLO = b"hello of an earlier release\n"
_LAYER = "sha256:ef17a8cc64b5d76a7bd5fc4547c9db0667e55eec18f9fbb411a6ae63078ac009"
_MANIFEST = "sha256:" + "ab" * 32
_RECORD = SlotRecord(
    slot=1,
    shard=NUMBER,
    layer_digest=_LAYER,
    index="index1",
    reference="127.0.0.1:33479/repo:tag",
    blob_size=618,
    manifest=_MANIFEST,
    inherited=[Inherited(1, 0o40700, 3, 4, 5, [])],
    annotations={"a": "b"},
)


def _unpack(root: Path) -> None:
    """Put the earlier root in a place."""
    with tarfile.open(_EARLIER / "root.tar.xz") as archive:
        archive.extractall(root)


def test_keepers_call_run_of_the_worker() -> None:
    assert worker.__name__ == "lazysnap.shard.worker"
    signature = inspect.signature(worker.run)
    signature.bind(object(), root="/root", number=3)
    assert [*signature.parameters][1:] == ["root", "number"]


def test_keeper_and_worker_understand_the_same_exit_statuses() -> None:
    assert keeper.EXIT_UNMOUNTED == worker.EXIT_UNMOUNTED == 0
    assert worker.EXIT_RESTART == 75


def test_the_package_around_the_keeper_imports_nothing() -> None:
    """As each worker is to import the release that is on disk."""
    source = (
        "import sys, lazysnap.shard; print([n for n in sys.modules if n.startswith('lazysnap')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "['lazysnap', 'lazysnap.shard']"


@pytest.mark.parametrize(
    "name",
    [
        "lazysnap.shard.keeper",
        "lazysnap.layers.builder",
        "lazysnap.unpack.process",
        "lazysnap.check.trial",
    ],
)
def test_modules_that_are_started_by_name_are_there(name: str) -> None:
    assert importlib.util.find_spec(name) is not None
    assert callable(importlib.import_module(name).main)


def test_a_keeper_understands_the_command_line_of_daemons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[argparse.Namespace] = []

    def lock(path: str) -> bool:
        found.append(inspect.currentframe().f_back.f_locals["arguments"])  # type: ignore[union-attr]
        return False

    monkeypatch.setattr(keeper, "_lock", lock)
    words = ["--root", str(tmp_path), "--number", "3", "--max-background=7"]
    monkeypatch.setattr(sys, "argv", ["keeper", *words, "--read-ahead-kib=8", "--writable"])
    mask = os.umask(0o022)
    try:
        assert keeper.main() == 3
    finally:
        os.umask(mask)
    (arguments,) = found
    assert (arguments.root, arguments.number) == (str(tmp_path), 3)
    assert (arguments.max_background, arguments.read_ahead_kib) == (7, 8)
    assert arguments.writable


def test_a_supervisor_knows_keepers_by_the_words_of_their_command_line(tmp_path: Path) -> None:
    def end(*words: str) -> bool:
        script = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
        process = subprocess.Popen([*script, *words], stdout=subprocess.PIPE)
        try:
            with process.stdout as output:  # type: ignore[union-attr]
                output.readline()  # before that it may not have its command line yet
            supervisor._signal(3, process.pid, signal.SIGTERM)
            try:
                return process.wait(5) == -signal.SIGTERM
            except subprocess.TimeoutExpired:
                return False
        finally:
            process.kill()
            process.wait()

    supervisor = Supervisor(str(tmp_path), 1)
    words = ["-m", "lazysnap.shard.keeper", "--root", str(tmp_path), "--number", "3"]
    assert end(*words)
    assert not end(*words[:-1], "4")


def test_workers_of_all_releases_have_these_calls() -> None:
    assert WorkerCalls.__abstractmethods__ >= {"ping", "restart"}


def test_inode_numbers_are_what_the_kernel_was_told() -> None:
    assert operations.inode_of(5, 6) == 5 << 32 | 7
    assert content_view.ROOT == 1 << 62 | 1
    assert store_view.ROOT == 1 << 61 | 1
    assert store_view.inode_of(5, store_view.BLOB) == 1 << 61 | 5 << 32 | 3
    assert store_view.image_inode("r/i:t") == 0x39D52F9F03627EED
    assert FIRST_XATTR_SHARD == 64


def test_an_earlier_root_is_read(tmp_path: Path) -> None:
    _unpack(tmp_path)
    assert read_slot(str(tmp_path), 1) == _RECORD
    store = SnapshotStore(str(tmp_path / "metadata.db"))
    try:
        names = {each.name: (each.kind, each.parent, dict(each.labels)) for each in store.walk()}
        (attachment,) = store.attachments().values()
        assert store.next_slot() == 2
    finally:
        store.close()
    assert names == {
        "layer": (Kind.COMMITTED, "", {"l": "v"}),
        "active": (Kind.ACTIVE, "layer", {}),
    }
    assert (attachment.slot, attachment.shard, attachment.layer_digest) == (1, NUMBER, _LAYER)
    assert msgspec.msgpack.decode(attachment.record, type=SlotRecord) == _RECORD
    cache = Cache(str(tmp_path / "cache"))
    index = open_index(str(tmp_path / "cache" / "index" / "index1"))
    assert index.readlink(index.lookup(0, b"link")) == b"etc/hello"
    assert is_complete(index, cache)
    assert read_tree(os.path.join(cache.trees, tree_name("index1"))) is not None
    profile = ProfileStore(str(tmp_path)).find(_MANIFEST)
    assert profile is not None
    assert profile.layers == {_LAYER: [Read("etc/hello", 0, 28, 5)]}
    settings = read_settings(str(tmp_path))
    assert (settings.background, settings.registry.retry_seconds) == (False, 30)


def test_slots_are_written_as_before(tmp_path: Path) -> None:
    """An earlier daemon may run, and reads them."""
    _unpack(tmp_path)
    assert msgspec.msgpack.encode(_RECORD) == (tmp_path / "slots" / "1").read_bytes()


@pytest.fixture
def code(tmp_path: Path) -> Iterator[Path]:
    """This release with the keeper of the earlier one; as that, once started, stays what it was."""
    code = tmp_path / "code"
    shutil.copytree(Path(lazysnap.__file__).parent, code / "lazysnap")
    shutil.copyfile(_EARLIER / "keeper.py.txt", code / "lazysnap" / "shard" / "keeper.py")
    yield code


def _serves(it: Shard) -> None:
    tree = it.mountpoint / "1"
    assert sorted(os.listdir(tree)) == ["etc", "link"]
    assert (tree / "link").readlink() == Path("etc/hello")
    assert (tree / "etc" / "hello").read_bytes() == _HELLO
    assert it.registry.log == []


@pytest.mark.root
@pytest.mark.fuse
def test_an_earlier_keeper_and_root_are_served_by_a_worker_of_this_release(
    tmp_path: Path, code: Path
) -> None:
    with shard(tmp_path) as it:
        assert it.process is not None
        it.process.terminate()
        it.process.wait(60)
        _unpack(it.root)
        it.start(python_path=code)
        assert it.call("health", slots=[1])[1]["state"] == "local"
        _serves(it)
        keeper_pid, worker_pid = it.pids()
        it.call("restart")
        it.wait_for_another_worker(than=worker_pid)
        assert it.pids()[0] == keeper_pid
        _serves(it)
        it.process.terminate()
        assert it.process.wait(60) == 0
