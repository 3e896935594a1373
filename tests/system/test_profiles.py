# SPDX-License-Identifier: Apache-2.0
"""What an image read when it started is fetched first when it is pulled again; or everything is."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, layers
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

# A start is watched until the next one of the same image, however long a slow machine takes.
_LEARN = "[fetch]\nbackground = false\nlearn_seconds = 600.0\n[shards]\ncount = 2\n"
_EXTRA = {f"extra/{n}": random.Random(n).randbytes(300_000) for n in range(8)}


def _push(it: Stack) -> str:
    """Busybox, and files that are read or not, farther apart than gaps that are filled."""
    tars = images.busybox_tars()
    extra = layers.make_tar([layers.file(path, data) for path, data in _EXTRA.items()])
    return it.push("image", [layers.estargz(tar) for tar in [*tars, extra]])


def _profiles(it: Stack) -> list[dict[str, Any]]:
    found = (it.lazysnap.root / "profiles").glob("*.json")
    return [json.loads(path.read_text()) for path in found]


def _learned(it: Stack, count: int) -> bool:
    return len(_profiles(it)) == count


def _status(it: Stack) -> dict[str, dict[str, Any]]:
    """Numbers of each layer, by digest."""
    return {
        layer["layer"]: layer
        for shard in it.lazysnap.shards()
        for layer in it.lazysnap.call(shard, "status")
    }


def _local(it: Stack) -> dict[str, int]:
    return {digest: layer["local_bytes"] for digest, layer in _status(it).items()}


def _objects(it: Stack) -> set[str]:
    cache = it.lazysnap.root / "cache"
    return {path.name for place in ("objects", "aside") for path in (cache / place).glob("*/*")}


def _forget(it: Stack, reference: str) -> None:
    """Remove the image, and all of its content from the node."""
    it.containerd.ctr("images", "rm", "--sync", reference)
    for directory in ("objects", "aside", "partial"):
        for path in (it.lazysnap.root / "cache" / directory).rglob("*"):
            if path.is_file():
                path.unlink()


def _learn(it: Stack, reference: str) -> None:
    it.pull(reference)
    it.run(reference, "sh", "-c", "cat /extra/2 /extra/6 | wc -c")
    it.run(reference, "true")
    wait_until(lambda: _profiles(it))


def test_a_second_pull_fetches_what_the_first_start_read(tmp_path: Path) -> None:
    with stack(tmp_path, config=_LEARN) as it:
        reference = _push(it)
        begun = time.monotonic()
        _learn(it, reference)
        elapsed = 1000 * (time.monotonic() - begun)
        (profile,) = _profiles(it)
        read = {path for found in profile["layers"].values() for path, *_ in found}
        assert {"extra/2", "extra/6"} <= read
        assert not read & {"extra/0", "extra/4"}
        times = [at for found in profile["layers"].values() for *_, at in found]
        assert 0 <= min(times) <= max(times) <= elapsed

        _forget(it, reference)
        it.pull(reference)

        def names(paths: set[str]) -> set[str]:
            return {hashlib.sha256(_EXTRA[path]).hexdigest() for path in paths}

        # Nobody reads.
        wait_until(lambda: names({"extra/2", "extra/6"}) <= _objects(it))
        wanted = sum(read[2] for found in profile["layers"].values() for read in found)
        wait_until(lambda: sum(_local(it).values()) >= wanted)
        assert not names(set(_EXTRA) - {"extra/2", "extra/6"}) & _objects(it)


def test_a_start_that_opens_hundreds_of_small_files_is_learned_whole(tmp_path: Path) -> None:
    modules = {f"modules/{n:03}.py": random.Random(n).randbytes(900 + n) for n in range(600)}
    tar = layers.make_tar([layers.file(path, data) for path, data in modules.items()])
    with stack(tmp_path, config=_LEARN) as it:
        shared = [layers.estargz(each) for each in [*images.busybox_tars(), tar]]
        wanted = {path for path in modules if path.endswith(("1.py", "4.py", "7.py"))}
        for number, own in enumerate(("one", "other"), 1):
            # The kernel opens most files by itself: those that were guessed, and of the other image
            # all that are small.
            marked = layers.estargz(layers.make_tar([layers.file("mark", own.encode())]))
            reference = it.push(own, [*shared, marked])
            it.pull(reference)
            told = it.run(reference, "sh", "-c", "cat /modules/*[147].py | wc -c")
            assert int(told) == sum(len(modules[path]) for path in wanted)
            it.run(reference, "true")
            wait_until(partial(_learned, it, number))
        for profile in _profiles(it):
            reads = [read for found in profile["layers"].values() for read in found]
            found = {path: (offset, length) for path, offset, length, _ in reads}
            assert {path for path in found if path.startswith("modules/")} == wanted
            assert all(found[path] == (0, len(modules[path])) for path in wanted)


def test_a_worker_that_dies_while_watched_teaches_nothing_wrong(tmp_path: Path) -> None:
    with stack(tmp_path, config=_LEARN) as it:
        reference = _push(it)
        it.pull(reference)
        it.run(reference, "md5sum", "/extra/1")
        for pid in it.lazysnap.workers().values():
            os.kill(pid, signal.SIGKILL)
        it.run(reference, "true")
        wait_until(lambda: "start not learned" in it.lazysnap.log())
        assert _profiles(it) == []
        _learn(it, reference)


def test_a_damaged_profile_harms_nothing(tmp_path: Path) -> None:
    with stack(tmp_path, config=_LEARN) as it:
        reference = _push(it)
        _learn(it, reference)
        (path,) = (it.lazysnap.root / "profiles").glob("*.json")
        profile = json.loads(path.read_text())
        for damage in (
            b"\xff" * 100,
            json.dumps(
                profile
                | {
                    "layers": {
                        k: [["../../x", 0, 9, 0], ["extra", 5, 2**62, 0]] for k in profile["layers"]
                    }
                }
            ).encode(),
        ):
            path.write_bytes(damage)
            _forget(it, reference)
            it.pull(reference)
            assert it.run(reference, "sh", "-c", "cat /extra/3 | wc -c").strip() == "300000"


def test_background_fetches_everything_until_all_layers_are_local(tmp_path: Path) -> None:
    config = """
        [fetch]
        background_delay_seconds = 0.1
        learn_profiles = false
        [registry]
        probe_valid_seconds = 0.1
    """
    with stack(tmp_path, config=config) as it:
        reference = _push(it)
        it.pull(reference)

        def states() -> set[str]:
            return {
                health["state"]
                for shard in it.lazysnap.shards()
                for health in it.lazysnap.call(shard, "health", slots=_slots(it, shard)).values()
            }

        wait_until(lambda: states() == {"local"})
        before = {digest: layer["fetched_bytes"] for digest, layer in _status(it).items()}
        assert all(layer["fetched_bytes"] <= layer["blob_bytes"] for layer in _status(it).values())
        # All of it can be read without the registry.
        it.run(reference, "sh", "-c", "cat /extra/* /etc/motd > /dev/null")
        assert {digest: layer["fetched_bytes"] for digest, layer in _status(it).items()} == before


def _slots(it: Stack, shard: int) -> list[int]:
    return [layer["slot"] for layer in it.lazysnap.call(shard, "status")]
