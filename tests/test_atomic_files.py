# SPDX-License-Identifier: Apache-2.0
"""Files that change as a whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lazysnap import atomic_files


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_made_and_replaced(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"", b"last"):
        atomic_files.replace(str(path), data, sync=sync)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_who_has_it_open_reads_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with path.open("rb") as file:
        atomic_files.replace(str(path), b"after")
        assert file.read() == b"before"


def test_a_link_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "link"
    for target in ("here", "there"):
        atomic_files.replace_link(str(path), target)
        assert os.readlink(path) == target
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_made_where_an_earlier_process_was_killed(tmp_path: Path) -> None:
    left = tmp_path / f"link.new-{os.getpid()}-{threading.get_ident()}"
    left.symlink_to("elsewhere")
    atomic_files.replace_link(str(tmp_path / "link"), "here")
    assert os.readlink(tmp_path / "link") == "here"
    assert not os.path.lexists(left)


@pytest.mark.parametrize(
    "write",
    [
        partial(atomic_files.replace, data=b"x"),
        partial(atomic_files.replace_link, target="x"),
    ],
)
def test_a_failure_leaves_all_as_it_was(tmp_path: Path, write: Callable[[str], None]) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    with pytest.raises(OSError):
        write(str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_many_threads_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(atomic_files.replace, str(path), b"%d" % n * 1000, sync=False)
            for n in range(200)
        ]:
            done.result()
    assert path.read_bytes() in {b"%d" % n * 1000 for n in range(200)}
    assert list(tmp_path.iterdir()) == [path]
