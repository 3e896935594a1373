# SPDX-License-Identifier: Apache-2.0
"""Files of lazysnap's own that are damaged or gone are made anew when their layer is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazysnap import mounts
from tests.support.stack import stack

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.containerd]


def test_damaged_indexes_and_records_are_repaired(tmp_path: Path) -> None:
    with stack(tmp_path) as it:
        reference = it.push_busybox("lazy", ["estargz", "zstd", "zstd-containers"])
        it.pull(reference)
        for damaged, gone in (("cache/index", "slots"), ("slots", "cache/index")):
            it.lazysnap.kill()
            it.lazysnap.kill_shards()
            for path in _files(it.lazysnap.root / damaged):
                path.write_bytes(b"no")
            for path in _files(it.lazysnap.root / gone):
                path.unlink()
            it.start_daemon()
            assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"


def test_a_layer_that_cannot_be_mounted_lets_no_container_start_without_it(tmp_path: Path) -> None:
    with stack(tmp_path) as it:
        reference = it.push_busybox("lazy", ["estargz"] * 3)
        it.pull(reference)
        it.run(reference, "true")
        layers = (it.lazysnap.root / "snapshots").glob("*/fs")
        _, place, _ = sorted(path for path in layers if path.is_mount())
        mounts.unmount(str(place))
        place.rmdir()
        place.touch()
        with pytest.raises(RuntimeError, match="cannot be mounted"):
            it.run(reference, "true")
        place.unlink()
        place.mkdir()
        assert it.run(reference, "cat", "/data/hello") == "hello from the top layer\n"


def _files(directory: Path) -> list[Path]:
    found = [path for path in directory.iterdir() if path.is_file()]
    assert sum(not path.suffix for path in found) == 3  # indexes have tails beside them
    return found
