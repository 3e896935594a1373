# SPDX-License-Identifier: Apache-2.0
"""How storages are found, and what they refer to."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazysnap.errors import Internal
from lazysnap.layerstore.storages import Storages, Using

_DIGEST = "sha256:" + "5" * 64


def _storage(directory: Path, *references: str) -> Path:
    """A storage with a layer for each reference, and one that is its own."""
    (directory / "overlay-layers").mkdir(parents=True)
    (directory / "overlay-layers" / "layers.lock").touch()
    for number, reference in enumerate(references):
        layer = directory / "overlay" / f"layer{number}"
        layer.mkdir(parents=True)
        image = base64.b64encode(reference.encode()).decode()
        (layer / "additionallayer").write_text(f"/a/store/{image}/{_DIGEST}")
    (directory / "overlay" / "own" / "diff").mkdir(parents=True)
    (directory / "overlay" / "l").mkdir()
    (directory / "overlay" / ".has-mount-program").touch()
    return directory


@contextmanager
def _holding(path: Path, *before: str) -> Iterator[int]:
    """A process that has a file open; its number."""
    script = f'exec 3<"{path}"; echo $$; read line'
    words = [*before, "sh", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()


def test_a_storage_is_learned_from_who_changes_it(tmp_path: Path) -> None:
    storage = _storage(tmp_path / "a storage", "one/image:tag", "other/image:tag")
    storages = Storages(str(tmp_path))
    found = {("one/image:tag", _DIGEST), ("other/image:tag", _DIGEST)}
    assert not found & storages.layers()
    with _holding(storage / "overlay-layers" / "layers.lock") as pid:
        assert storages.using(pid) is Using.STORING
    assert found <= storages.layers()
    assert found <= Storages(str(tmp_path)).layers()


def test_a_storage_can_be_learned_while_others_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storages = Storages(str(tmp_path))
    new = _storage(tmp_path / "new", "one/image:tag")
    list_really = os.listdir

    def list_meanwhile(path: str) -> list[str]:
        """As another thread would, between two storages."""
        if path.endswith("/overlay"):
            with _holding(new / "overlay-layers" / "layers.lock") as pid:
                assert storages.using(pid) is Using.STORING
        return list_really(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", list_meanwhile)
        storages.layers()
    assert ("one/image:tag", _DIGEST) in storages.layers()


def test_who_has_no_lock_only_looks(tmp_path: Path) -> None:
    storage = _storage(tmp_path / "s", "one/image:tag")
    storages = Storages(str(tmp_path))
    with _holding(storage / "overlay" / "layer0" / "additionallayer") as pid:
        assert storages.using(pid) is Using.LOOKING
    assert storages.using(pid) is Using.LOOKING
    assert ("one/image:tag", _DIGEST) not in storages.layers()


@pytest.mark.root
def test_a_storage_that_we_do_not_see_is_not_taken_for_another(tmp_path: Path) -> None:
    storage = _storage(tmp_path / "s")
    lock = storage / "overlay-layers" / "layers.lock"
    hide = f'mount -t tmpfs none {storage}; mkdir {storage}/overlay-layers; : >{lock}; exec "$@"'
    storages = Storages(str(tmp_path))
    with _holding(lock, "unshare", "--mount", "sh", "-c", hide, "sh") as pid:
        assert storages.using(pid) is Using.UNSEEN


def test_a_storage_that_is_gone_refers_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "storages").write_text(f"{tmp_path}/gone\n")
    assert isinstance(Storages(str(tmp_path)).layers(), set)


def test_a_storage_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    os.symlink(loop, loop)
    (tmp_path / "storages").write_text(f"{loop}\n")
    with pytest.raises(Internal):
        Storages(str(tmp_path)).layers()


@pytest.mark.parametrize("text", ["", "/", "a", "/x/y", "/store/!!/sha256:1", "\0", "/é/é"])
def test_what_no_client_writes_is_passed_over(tmp_path: Path, text: str) -> None:
    storage = _storage(tmp_path / "s", "one/image:tag")
    (storage / "overlay" / "layer0" / "additionallayer").write_text(text)
    (tmp_path / "storages").write_text(f"{storage}\n")
    assert not {layer for layer in Storages(str(tmp_path)).layers() if layer[1] == _DIGEST}
