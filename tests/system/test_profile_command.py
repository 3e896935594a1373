# SPDX-License-Identifier: Apache-2.0
"""`lazysnap profile` on the whole stack: recorded, moved through a file and through the registry, used."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess

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


def _run(it: Stack, *arguments: str, command: Sequence[str] = ()) -> CompletedProcess[str]:
    words = [
        *(sys.executable, "-m", "lazysnap", "profile", *arguments, "--address"),
        *(it.containerd.address, "--root", str(it.lazysnap.root)),
        *(["--", *command] if command else []),
    ]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def _profile(it: Stack, *arguments: str, command: Sequence[str] = ()) -> str:
    done = _run(it, *arguments, command=command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def _old(it: Stack, *arguments: str, command: Sequence[str] = ()) -> str:
    """The form without subcommands, which says that it is old."""
    done = _run(it, *arguments, "--plain-http", command=command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: this is the old form of `lazysnap profile ")
    assert done.stderr.count("\n") == 1
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
    command = ("sh", "-c", "cat /data/many/007 >/dev/null")
    shown = _profile(it, "record", reference, "--json", command=command)
    reads = [read for each in json.loads(shown)["layers"].values() for read in each]
    assert ["data/many/007", 0, 49] in [read[:3] for read in reads]
    assert "data/many/030" not in [read[0] for read in reads]
    assert _profile(it, "push", reference, "--plain-http") == ""
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
    _profile(it, "record", reference, command=("cat", "/data/hello"))
    _profile(it, "export", reference, str(file))
    _profile_files(it)[0].unlink()
    _profile(it, "import", reference, str(file))
    assert json.loads(_profile_files(it)[0].read_text()) == json.loads(file.read_text())
    _profile(it, "forget", reference)
    assert _profile_files(it) == []


def test_a_profile_is_fetched_on_purpose(it: Stack) -> None:
    reference = _push(it)
    it.pull(reference)
    _profile(it, "record", reference, command=("cat", "/data/hello"))
    recorded = json.loads(_profile(it, "show", reference, "--json"))
    _profile(it, "push", reference, "--plain-http")
    _profile(it, "forget", reference)
    fetched = json.loads(_profile(it, "fetch", reference, "--plain-http", "--json"))
    assert fetched == recorded == json.loads(_profile_files(it)[0].read_text())


def test_the_image_s_own_command_is_recorded_until_the_time_is_over(it: Stack) -> None:
    reference = _push(it)
    it.pull(reference)  # its command is a shell, which ctr gives an input without an end
    assert '["bin/busybox"' in _profile(it, "record", reference, "--seconds", "5", "--json")
    assert it.containerd.ctr("containers", "ls", "-q") == ""
    assert it.containerd.ctr("tasks", "ls", "-q") == ""


def test_the_old_form_does_all_that_it_did(it: Stack) -> None:
    reference = _push(it)
    it.pull(reference)
    file = it.directory / "profile.json"
    recorded = _old(it, reference, "--json", "--export", str(file), command=("cat", "/data/hello"))
    assert json.loads(recorded) == json.loads(file.read_text())
    assert _old(it, reference).startswith("manifest sha256:")
    _old(it, reference, "--push")
    assert _old(it, reference, "--forget") == ""
    assert _profile_files(it) == []
    assert _old(it, reference, "--json", "--fetch") == recorded
    _profile_files(it)[0].unlink()
    assert _old(it, reference, "--json", "--import", str(file)) == recorded


def test_an_image_that_is_not_lazy_here_is_refused_with_a_hint(it: Stack) -> None:
    reference = it.push_busybox("plain", ["plain"] * 3)
    it.pull(reference)
    done = _run(it, "record", reference, command=("true",))
    assert done.returncode == 1
    assert "no layer of" in done.stderr
    assert "hint: " in done.stderr
