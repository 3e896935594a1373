# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lazysnap.errors import Internal, NotFound
from lazysnap.layers.slots import (
    Inherited,
    SlotRecord,
    list_slots,
    read_slot,
    remove_slot,
    write_slot,
)
from lazysnap.layers.store_names import NamedLayer, list_names, read_name, remove_name, write_name

RECORD = SlotRecord(
    slot=7,
    shard=1,
    layer_digest="sha256:" + "0" * 64,
    index="name",
    reference="host/repo:tag",
    blob_size=1 << 40,
    inherited=[Inherited(3, 0o755, 1, 2, 4, [(b"user.\xff", b"\0")])],
    annotations={"a": "b"},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_slot(str(tmp_path), RECORD)
    assert read_slot(str(tmp_path), 7) == RECORD
    assert list_slots(str(tmp_path)) == [7]
    remove_slot(str(tmp_path), 7)
    remove_slot(str(tmp_path), 7)
    assert list_slots(str(tmp_path)) == []
    with pytest.raises(NotFound):
        read_slot(str(tmp_path), 7)


def test_damaged_and_foreign_records_are_errors(tmp_path: Path) -> None:
    write_slot(str(tmp_path), RECORD)
    path = tmp_path / "slots" / "7"
    good = path.read_bytes()
    for wrong in (b"", good[:-3], b"\x80", b"\x01", good.replace(b"slot\x07", b"slot\x08")):
        path.write_bytes(wrong)
        with pytest.raises(Internal, match="slots/7"):
            read_slot(str(tmp_path), 7)


def test_a_disk_that_refuses_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "slots" / "7").mkdir(parents=True)  # cannot be replaced by a file
    with pytest.raises(Internal):
        write_slot(str(tmp_path), RECORD)
    assert [p.name for p in (tmp_path / "slots").iterdir()] == ["7"]
    with pytest.raises(Internal):
        remove_slot(str(tmp_path), 7)


def test_threads_can_restore_a_record_at_the_same_time(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def restore() -> None:
        try:
            for _ in range(50):
                write_slot(str(tmp_path), RECORD)
                assert read_slot(str(tmp_path), 7) == RECORD
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=restore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [p.name for p in (tmp_path / "slots").iterdir()] == ["7"]


def test_names_are_kept_like_slots(tmp_path: Path) -> None:
    name = NamedLayer(slot=7, reference="host/repo:tag", digest="sha256:" + "0" * 64, info=b"{}")
    write_name(str(tmp_path), name)
    assert read_name(str(tmp_path), 7) == name
    assert list_names(str(tmp_path)) == [7]
    remove_name(str(tmp_path), 7)
    remove_name(str(tmp_path), 7)
    with pytest.raises(NotFound):
        read_name(str(tmp_path), 7)
    (tmp_path / "names" / "7").mkdir()
    with pytest.raises(Internal):
        remove_name(str(tmp_path), 7)
