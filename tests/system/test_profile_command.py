# SPDX-License-Identifier: Apache-2.0
"""`lazysnap profile` on the whole stack: recorded, moved through a file and through the registry, used."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, layers
from tests.support.stack import Stack, stack, wait_until

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]

_CONFIG = "[fetch]\nbackground = false\nlearn_profiles = false\n"
_MANY = {f"data/many/{n:03d}": f"file {n}\n".encode() * n for n in range(50)}


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path, config=_CONFIG) as it:
        yield it


def _profile(it: Stack, reference: str, *arguments: str) -> str:
    command = [
        *(sys.executable, "-m", "lazysnap", "profile", reference, "--address"),
        *(it.containerd.address, "--root", str(it.lazysnap.root), "--plain-http", *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _cached(it: Stack, path: str) -> bool:
    name = hashlib.sha256(_MANY[path]).hexdigest()
    cache = it.lazysnap.root / "cache"
    return any((cache / place / name[:2] / name).exists() for place in ("objects", "aside"))


def _push(it: Stack) -> str:
    # One member for each file, and no landmark: nothing comes along by chance but neighbours.
    return it.push("image", [layers.estargz(tar) for tar in images.busybox_tars()])


def _forget_everything(it: Stack, reference: str) -> None:
    it.containerd.ctr("images", "rm", "--sync", reference)
    cache = it.lazysnap.root / "cache"
    for path in (*cache.glob("objects/??/*"), *cache.glob("aside/??/*")):
        path.unlink()


def test_a_profile_goes_through_the_registry_to_a_node_that_never_ran_the_image(it: Stack) -> None:
    reference = _push(it)
    it.pull(reference)
    shown = _profile(it, reference, "--json", "--", "sh", "-c", "cat /data/many/007 >/dev/null")
    reads = [read for each in json.loads(shown)["layers"].values() for read in each]
    assert ["data/many/007", 0, 49] in [read[:3] for read in reads]
    assert "data/many/030" not in [read[0] for read in reads]
    _profile(it, reference, "--push")
    _forget_everything(it, reference)
    _profile_files(it)[0].unlink()
    it.lazysnap.stop()  # which remembers for some minutes that there was none
    it.start_daemon()
    it.pull(reference)
    wait_until(lambda: _cached(it, "data/many/007"))
    assert len(_profile_files(it)) == 1
    assert "profile found in the registry" in it.lazysnap.log()


def _profile_files(it: Stack) -> list[Path]:
    return list((it.lazysnap.root / "profiles").glob("*.json"))


def test_a_profile_goes_through_a_file(it: Stack) -> None:
    reference = _push(it)
    it.pull(reference)
    file = it.directory / "profile.json"
    _profile(it, reference, "--export", str(file), "--", "cat", "/data/hello")
    _profile_files(it)[0].unlink()
    _profile(it, reference, "--import", str(file))
    assert json.loads(_profile_files(it)[0].read_text()) == json.loads(file.read_text())
    _profile(it, reference, "--forget")
    assert _profile_files(it) == []


def test_an_image_that_is_not_lazy_here_is_refused_with_a_hint(it: Stack) -> None:
    reference = it.push_busybox("plain", ["plain"] * 3)
    it.pull(reference)
    command = [
        *(sys.executable, "-m", "lazysnap", "profile", reference, "--address"),
        *(it.containerd.address, "--root", str(it.lazysnap.root), "--", "true"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no layer of" in done.stderr
    assert "hint: " in done.stderr
