# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazysnap.cache import Cache, objects, stamps
from lazysnap.cache.objects import ObjectStore
from lazysnap.cache.stamps import seal_time

DATA = b"the content of a file\n" * 1000
KEY = hashlib.sha256(DATA).digest()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = ObjectStore(str(tmp_path / "objects"), str(tmp_path / "aside"))
    yield store
    store.close()


def _read(store: ObjectStore, key: bytes = KEY, size: int = len(DATA)) -> bytes | None:
    fd = store.open(key, size)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _path(store: ObjectStore) -> Path:
    return Path(store.path(KEY))


def _again(store: ObjectStore) -> ObjectStore:
    """The store as another process, or one after a crash, sees it."""
    return ObjectStore(store.root, store.aside)


def test_what_was_put_can_be_opened(store: ObjectStore) -> None:
    assert _read(store) is None
    store.put(KEY, DATA)
    assert store.exists(KEY, len(DATA))
    assert _read(store) == DATA


def test_another_process_verifies_what_is_not_sealed(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    other = _again(store)
    assert _read(other) is None
    assert other.verify(KEY)
    assert _read(other) == DATA


def test_a_sealed_object_needs_no_verification(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    assert store.seal() == 1
    assert store.seal() == 0
    assert _read(_again(store)) == DATA
    assert _path(store).stat().st_mtime_ns == seal_time(KEY)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_object_is_found_and_removed(store: ObjectStore, sealed: bool) -> None:
    store.put(KEY, DATA)
    if sealed:
        store.seal()
    with _path(store).open("r+b") as file:
        file.write(b"THE")
    other = _again(store)
    assert _read(other) is None
    assert not other.verify(KEY)
    assert not other.exists(KEY, len(DATA))


def test_a_truncated_object_is_not_opened_even_with_the_seal(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()
    os.truncate(_path(store), 10)
    os.utime(_path(store), ns=(seal_time(KEY), seal_time(KEY)))
    assert _read(_again(store)) is None


def test_putting_again_replaces_what_is_there(store: ObjectStore) -> None:
    _path(store).write_bytes(b"wrong")
    store.put(KEY, DATA)
    assert _read(store) == DATA


def test_without_anonymous_files_it_works_the_same(store: ObjectStore) -> None:
    store._files.anonymous = False  # as on a file system without O_TMPFILE
    store.put(KEY, DATA)
    assert _read(store) == DATA
    assert [p.name for p in _path(store).parent.iterdir()] == [KEY.hex()]


def test_a_reader_goes_on_after_removal(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    fd = store.open(KEY, len(DATA))
    assert fd is not None
    store.remove(KEY)
    assert os.pread(fd, 3, 0) == b"the"
    os.close(fd)
    assert not store.exists(KEY, len(DATA))


def test_adopting_checks_the_content(store: ObjectStore, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(DATA)
    bad.write_bytes(b"no")
    assert not store.adopt(str(bad), KEY)
    assert bad.exists()
    assert store.adopt(str(good), KEY)
    assert not good.exists()
    assert _read(store) == DATA


def test_what_another_process_adopted_meanwhile_stays(store: ObjectStore, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.write_bytes(DATA)
    other = _again(store)
    link = store._files.link

    def adopted_first(*args: object) -> None:
        assert other.adopt(str(partial), KEY)
        link(*args)  # type: ignore[arg-type]

    store._files.link = adopted_first  # type: ignore[method-assign]  # the other process is quicker
    assert store.adopt(str(partial), KEY)
    assert not partial.exists()
    assert _read(store) == DATA


def test_an_object_of_another_size_does_not_count(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    assert not store.exists(KEY, len(DATA) - 1)
    os.truncate(_path(store), 10)
    assert not store.exists(KEY, len(DATA))


def test_iterating_names_all_objects(store: ObjectStore, tmp_path: Path) -> None:
    keys = set()
    for number in range(20):
        data = b"%d" % number
        keys.add(hashlib.sha256(data).digest())
        store.put(hashlib.sha256(data).digest(), data)
    _path(store).parent.joinpath("new-1-abc").write_bytes(b"left by a crash")
    assert {key for key, _ in store} == keys


@pytest.mark.root
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    import subprocess

    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=600", "none", str(mountpoint)], check=True
    )
    try:
        store = ObjectStore(str(mountpoint / "objects"), str(mountpoint / "aside"))
        data = os.urandom(2 << 20)
        key = hashlib.sha256(data).digest()
        with pytest.raises(OSError, match="No space") as caught:
            store.put(key, data)
        assert caught.value.errno == errno.ENOSPC
        assert not store.exists(key, len(data))
        store.put(KEY, DATA)
        assert _read(store) == DATA
        store.close()
    finally:
        subprocess.run(["umount", "--lazy", str(mountpoint)], check=True)


def test_opening_notes_the_use_at_most_hourly_and_keeps_the_seal(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()
    two_hours_ago = time.time_ns() - 7200 * 10**9
    os.utime(_path(store), ns=(two_hours_ago, seal_time(KEY)))
    assert _read(store) == DATA
    first = _path(store).stat()
    assert time.time_ns() - first.st_atime_ns < 60 * 10**9
    assert first.st_mtime_ns == seal_time(KEY)
    assert _read(store) == DATA
    assert _path(store).stat().st_ctime_ns == first.st_ctime_ns


def test_sealing_keeps_the_time_of_the_last_use(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()
    assert abs(time.time_ns() - _path(store).stat().st_atime_ns) < 60 * 10**9


def test_what_replaced_an_object_after_the_sync_is_not_sealed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, DATA)
    other = _again(store)
    sync = stamps.sync_filesystem

    def sync_and_lose(fd: int) -> None:
        sync(fd)
        other.remove(KEY)
        other.put(KEY, DATA)

    monkeypatch.setattr(stamps, "sync_filesystem", sync_and_lose)
    assert store.seal() == 0
    assert _path(store).stat().st_mtime_ns != seal_time(KEY)


def test_adopting_takes_what_was_checked_not_what_has_its_name_now(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "complete"
    path.write_bytes(DATA)
    check = objects._sha256

    def check_and_lose(fd: int) -> bytes:
        digest = check(fd)
        path.rename(tmp_path / "evicted")
        path.write_bytes(bytes(len(DATA)))
        return digest

    monkeypatch.setattr(objects, "_sha256", check_and_lose)
    assert store.adopt(str(path), KEY)
    assert _read(store) == DATA


def test_a_removal_begins_another_generation(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    before = store.generation()
    assert store.generation() == before
    other = _again(store)
    assert store.generation() == before
    other.remove(KEY)
    assert store.generation() != before


def test_what_is_held_is_kept_from_the_kernel_until_it_is_not(store: ObjectStore) -> None:
    shown, aside = Path(store.root, store.name(KEY)), Path(store.aside, store.name(KEY))
    store.hold_above = 0
    store.put(KEY, DATA)
    assert (shown.exists(), aside.exists()) == (False, True)
    assert _read(store) == DATA
    assert store.seal() == 1
    assert (shown.exists(), aside.exists()) == (False, True)
    assert _read(_again(store)) == DATA
    store.hold_above = None
    store.seal()
    assert (shown.exists(), aside.exists()) == (True, False)
    store.hold(KEY)
    assert (shown.exists(), aside.exists()) == (False, True)
    assert _read(store) == DATA
    store.seal()
    assert (shown.exists(), aside.exists()) == (True, False)


@pytest.mark.parametrize("above", [len(DATA) - 1, len(DATA)])
@pytest.mark.parametrize("anonymous", [True, False])
def test_only_what_is_larger_than_the_bound_is_held(
    store: ObjectStore, tmp_path: Path, above: int, anonymous: bool
) -> None:
    store._files.anonymous = anonymous
    store.hold_above = above
    store.put(KEY, DATA)
    shown = Path(store.root, store.name(KEY))
    assert shown.exists() == (above == len(DATA))
    store.remove(KEY)
    complete = tmp_path / "complete"
    complete.write_bytes(DATA)
    assert store.adopt(str(complete), KEY)
    assert shown.exists() == (above == len(DATA))
    store.seal()
    assert shown.exists() == (above == len(DATA))
    store.hold_above = None
    store.release()
    assert shown.exists()


def test_what_a_dead_process_has_held_is_moved_by_the_next(store: ObjectStore) -> None:
    store.hold_above = 0
    store.put(KEY, DATA)
    store.seal()
    assert _again(store).recover() == (1, 0)
    assert Path(store.root, store.name(KEY)).exists()


def test_what_another_process_has_not_sealed_is_taken_aside_and_comes_back(
    store: ObjectStore,
) -> None:
    store.put(KEY, DATA)
    assert _again(store).recover() == (0, 1)
    assert not Path(store.root, store.name(KEY)).exists()
    assert _read(store) == DATA
    store.seal()
    assert Path(store.root, store.name(KEY)).exists()
    assert _read(_again(store)) == DATA


def test_a_changed_object_is_taken_away_from_the_kernel(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()
    shown = Path(store.root, store.name(KEY))
    with shown.open("r+b") as file:
        file.write(b"THE")
    other = _again(store)
    assert _read(other) is None
    before = other.generation()
    assert other.recover() == (0, 1)
    assert not shown.exists()
    assert other.generation() != before
    assert not other.verify(KEY)
    other.put(KEY, DATA)
    other.seal()
    assert shown.read_bytes() == DATA


def test_after_a_boot_the_kernel_sees_only_what_was_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(str(tmp_path / "cache"))
    cache.recover_after_boot()
    cache.objects.put(KEY, DATA)
    shown = Path(cache.objects.root, cache.objects.name(KEY))
    Cache(cache.root).recover_after_boot()
    assert shown.exists()
    monkeypatch.setattr("lazysnap.cache._boot_id", lambda: "another")
    again = Cache(cache.root)
    again.recover_after_boot()
    assert not shown.exists()
    assert again.objects.verify(KEY)


def test_a_changed_object_does_not_replace_a_right_one(store: ObjectStore) -> None:
    store.hold_above = 0
    store.put(KEY, DATA)
    Path(store.root, store.name(KEY)).write_bytes(b"wrong")
    _again(store).distrust(KEY)
    assert not Path(store.root, store.name(KEY)).exists()
    assert _read(store) == DATA


def test_a_changed_object_does_not_come_back_by_another_process(store: ObjectStore) -> None:
    store.put(KEY, DATA)
    store.seal()
    with _path(store).open("r+b") as file:
        file.write(b"WRONG")
    store.distrust(KEY)
    store.put(KEY, DATA)
    with contextlib.closing(_again(store)) as other:
        other.recover()  # as when another worker starts: puts aside what is not sealed
        store.seal()
        other.verify(KEY)
        assert _read(other) == DATA
    assert not _path(store).exists() or _path(store).read_bytes() == DATA


@pytest.mark.parametrize("parts", [[0, 3], [2, 3, 5], [0, 7], [1, 2]])
def test_holes_are_hashed_without_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[int]
) -> None:
    """Bytes at some of 8 places, two megabytes each; all else are holes."""
    place = 2 << 20
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 * place - 5)
        for number in parts:
            file.seek(number * place)
            file.write(b"x" * 5000)
    read = 0
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        nonlocal read
        data = pread(fd, size, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", counting)
    with path.open("rb") as sparse:
        assert objects._sha256(sparse.fileno()) == hashlib.sha256(path.read_bytes()).digest()
    assert read <= len(parts) * (64 << 10)
