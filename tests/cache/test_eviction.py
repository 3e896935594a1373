# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazysnap.cache import Cache, PartialFile
from lazysnap.cache.eviction import CacheLimits, Evictor
from lazysnap.cache.inventory import Kind, entries
from lazysnap.cache.stamps import seal_time
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from tests.support.filesystems import tmpfs

MIB = 1 << 20
NO_RESERVE = CacheLimits(reserve_bytes=0, reserve_percent=0)


def _limit(size: int) -> CacheLimits:
    return CacheLimits(size_limit_bytes=size, reserve_bytes=0, reserve_percent=0)


def _put(cache: Cache, number: int, size: int, age: float | None = None) -> bytes:
    """Store an object, last used `age` seconds ago, and seal it."""
    data = b"%d" % number + bytes(size - len(b"%d" % number))
    key = hashlib.sha256(data).digest()
    cache.objects.put(key, data)
    if age is not None:
        used = time.time_ns() - int(age * 1e9)
        path = cache.objects.path(key)
        os.utime(path, ns=(used, seal_time(key)))
    return key


def _disk_bytes(cache: Cache) -> int:
    return sum(entry.disk_bytes for entry in entries(cache))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


def test_what_was_not_used_for_longest_goes(cache: Cache) -> None:
    keys = [_put(cache, n, MIB, age=3600 * (20 - n)) for n in range(20)]
    contents, size = (counts.counter(each) for each in (families.EVICTED, families.EVICTED_BYTES))
    before = [*contents, *size]
    evicted = Evictor(cache, _limit(10 * MIB)).look()
    left = [cache.objects.open(key, MIB) is not None for key in keys]
    assert left == sorted(left)
    # a tenth less than the limit, and no more than one object beyond
    assert 8 * MIB <= _disk_bytes(cache) <= 9 * MIB
    assert evicted == 20 * MIB - _disk_bytes(cache)
    assert [*contents, *size] == [before[0] + left.count(False), before[1] + evicted]
    assert Evictor(cache, _limit(10 * MIB)).look() == 0


def test_opening_saves_an_object_that_is_old(cache: Cache) -> None:
    keys = [_put(cache, n, MIB, age=3600 * (20 - n)) for n in range(4)]
    fd = cache.objects.open(keys[0], MIB)
    assert fd is not None
    os.close(fd)
    Evictor(cache, _limit(2 * MIB)).look()
    kept = [cache.objects.open(key, MIB) is not None for key in keys]
    assert kept == [True, False, False, False]


def test_a_time_in_the_future_is_none(cache: Cache) -> None:
    wrong = _put(cache, 1, MIB, age=-5 * 365 * 86400)
    right = _put(cache, 2, MIB, age=86400)
    Evictor(cache, _limit(2 * MIB - 1)).look()
    assert cache.objects.open(right, MIB) is not None
    assert cache.objects.open(wrong, MIB) is None


def test_an_eviction_before_the_clock_was_set_back_is_not_a_recent_one(cache: Cache) -> None:
    _put(cache, 1, MIB, age=86400)
    evictor = Evictor(cache, _limit(MIB - 1))
    assert evictor.seconds_since_eviction() == float("inf")
    assert evictor.look() == MIB
    assert evictor.seconds_since_eviction() < 3600
    later = time.time() + 365 * 86400
    os.utime(os.path.join(cache.root, "evicted"), (later, later))
    assert evictor.seconds_since_eviction() > 3600


def test_partial_files_go_with_their_maps(cache: Cache) -> None:
    file = PartialFile(cache.partial, bytes(32), 4 * MIB, 4)
    file.write(0, 0, os.urandom(MIB))
    used = time.time_ns() - 10**13
    os.utime(file.base + ".data", ns=(used, used))
    _put(cache, 1, MIB)
    before = cache.objects.generation()
    (partial,) = (entry for entry in entries(cache) if entry.kind is Kind.PARTIAL)
    assert partial.disk_bytes == MIB
    assert Evictor(cache, _limit(3 * MIB // 2)).look() == MIB
    assert os.listdir(cache.partial) == []
    assert cache.objects.generation() != before
    assert len(os.pread(file.fd, MIB, 0)) == MIB
    file.close()


def test_processes_add_up_what_they_store(cache: Cache) -> None:
    evictors = [Evictor(cache, _limit(20 * MIB)) for _ in range(3)]
    for evictor in evictors:
        assert evictor.look() == 0  # counts
    for number in range(60):
        _put(cache, number, MIB, age=1000 - number)
        evictors[number % 3].stored(MIB)
        for evictor in evictors:
            evictor.look()
        assert _disk_bytes(cache) <= 20 * MIB
    assert _disk_bytes(cache) >= 18 * MIB


@pytest.mark.parametrize("text", ["", "not a number", "99999999999999 {now}", "-5 {now}", "7 0"])
def test_a_wrong_sum_evicts_nothing_that_may_stay(cache: Cache, text: str) -> None:
    for number in range(3):
        _put(cache, number, MIB)
    Path(cache.root, "usage").write_text(text.format(now=int(time.time())))
    assert Evictor(cache, _limit(4 * MIB)).look() == 0
    assert _disk_bytes(cache) == 3 * MIB


@contextmanager
def _locked(cache: Cache) -> Iterator[None]:
    fd = os.open(cache.root, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def test_only_one_process_evicts(cache: Cache) -> None:
    for number in range(3):
        _put(cache, number, MIB)
    evictor = Evictor(cache, _limit(MIB))
    with _locked(cache):
        assert evictor.look() == 0
        assert _disk_bytes(cache) == 3 * MIB
    assert evictor.look() > 0


def test_limits_that_are_not_reached_cost_no_look_at_the_directories(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    evictor = Evictor(cache, _limit(100 * MIB))
    evictor.look()
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("read a directory"))
    for _ in range(10):
        evictor.stored(MIB)
        evictor.look()
    Evictor(cache, NO_RESERVE).look()


@pytest.mark.root
def test_the_reserve_is_kept_free(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=40m") as disk:
        cache = Cache(str(disk / "cache"))
        keys = [_put(cache, n, MIB, age=3600 * (40 - n)) for n in range(30)]
        (disk / "other").write_bytes(bytes(6 * MIB))
        assert Evictor(cache, CacheLimits(reserve_bytes=8 * MIB)).look() > 0
        status = os.statvfs(disk)
        assert 8 * MIB <= status.f_bavail * status.f_frsize <= 10 * MIB
        left = [cache.objects.exists(key, MIB) for key in keys]
        assert left == sorted(left)


@pytest.mark.root
def test_the_reserve_leaves_three_quarters_of_a_small_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=40m") as disk:
        cache = Cache(str(disk / "cache"))
        for number in range(29):
            _put(cache, number, MIB)
        assert Evictor(cache, CacheLimits()).look() == 0


@pytest.mark.root
def test_inodes_are_kept_free_too(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=100m,nr_inodes=1500") as disk:
        cache = Cache(str(disk / "cache"))
        with pytest.raises(OSError, match="No space") as caught:
            for number in range(1500):
                _put(cache, number, 100, age=2000 - number)
        assert caught.value.errno == errno.ENOSPC
        assert Evictor(cache, NO_RESERVE).look() > 0
        assert os.statvfs(disk).f_favail >= 1500 // 100


@pytest.mark.root
@pytest.mark.parametrize("options", ["size=20m", "size=100m,nr_inodes=700"])
def test_a_full_disk_makes_room_at_once(tmp_path: Path, options: str) -> None:
    size = MIB if "nr_inodes" not in options else 1000
    with tmpfs(tmp_path / "disk", options) as disk:
        cache = Cache(str(disk / "cache"))
        evictor = Evictor(cache, NO_RESERVE)
        for number in range(1000):
            try:
                _put(cache, number, size, age=2000 - number)
            except OSError:
                assert evictor.make_room(size)
                assert _put(cache, number, size)
                break
        else:
            pytest.fail("the disk never was full")


@pytest.mark.root
def test_with_nothing_to_evict_there_is_no_room(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=10m") as disk:
        cache = Cache(str(disk / "cache"))
        evictor = Evictor(cache, NO_RESERVE)
        (disk / "other").write_bytes(bytes(9 * MIB))
        assert not evictor.make_room(4 * MIB)
        _put(cache, 1, 1000)
        assert not evictor.make_room(4 * MIB)  # not looked again so soon
        assert len(list(entries(cache))) == 1


def test_what_would_go_next_is_on_probation_until_it_is_used(cache: Cache) -> None:
    """As when the kernel reads objects by itself, and no time of last use tells of it."""
    keys = [_put(cache, n, MIB, age=7200 * (10 - n)) for n in range(10)]
    for key in keys:
        assert cache.objects.open(key, MIB) is not None  # sealed, and so moved by the next call
    for n, key in enumerate(keys):
        os.utime(
            cache.objects.path(key), ns=(time.time_ns() - 7200 * 10**9 * (10 - n), seal_time(key))
        )
    cache.objects.seal()

    def settled(key: bytes) -> bool:
        return os.path.exists(os.path.join(cache.objects.root, cache.objects.name(key)))

    assert all(settled(key) for key in keys)
    Evictor(cache, _limit(9 * MIB)).look()
    left = [key for key in keys if cache.objects.exists(key, MIB)]
    assert left == keys[-len(left) :]
    assert [settled(key) for key in left] == sorted(settled(key) for key in left)
    assert not settled(left[0])
    assert settled(left[-1])
    assert cache.objects.open(left[0], MIB) is not None
    cache.objects.seal()
    assert settled(left[0])
    Evictor(cache, _limit((len(left) - 1) * MIB)).look()
    assert cache.objects.exists(left[0], MIB)
    assert not cache.objects.exists(left[1], MIB)


def _layer(cache: Cache, name: str, age: float, size: int = MIB) -> None:
    """An index with its tail, and the image of a tree, last used `age` seconds ago."""
    used = time.time_ns() - int(age * 1e9)
    for path in (f"{cache.index}/{name}", f"{cache.index}/{name}.tail", f"{cache.trees}/{name}.1"):
        Path(path).write_bytes(os.urandom(size))
        os.utime(path, ns=(used, used))


def _layers(cache: Cache) -> list[str]:
    return sorted(os.listdir(cache.index) + os.listdir(cache.trees))


def test_layer_files_count_and_go_as_contents_do(cache: Cache) -> None:
    keys = [_put(cache, n, MIB, age=86400 * day) for n, day in enumerate((1, 3, 5, 7))]
    _layer(cache, "used", age=86400 * 9)
    _layer(cache, "old", age=86400 * 6)
    _layer(cache, "new", age=86400 * 2)
    _layer(cache, "young", age=7000)
    total = (4 + 4 * 3) * MIB

    def in_use() -> set[str]:
        return {"used", "used.1"}

    assert Evictor(cache, _limit(total), in_use).look() == 0
    # One content, and of the old layer one of the two entries; a tenth more than is too much.
    evicted = Evictor(cache, _limit(total - 1), in_use).look()
    assert evicted == 3 * MIB
    assert [cache.objects.open(key, MIB) is not None for key in keys] == [True, True, True, False]
    kept = ["new", "new.1", "new.tail", "used", "used.1", "used.tail", "young", "young.1"]
    assert set(kept) <= set(_layers(cache))
    assert "old" not in _layers(cache) or "old.1" not in _layers(cache)
    assert ("old" in _layers(cache)) == ("old.tail" in _layers(cache))


def test_layer_files_of_several_names_count_once(cache: Cache) -> None:
    key = _put(cache, 0, MIB, age=7200)
    _layer(cache, "first", age=86400)
    for number in range(9):
        for path in (f"{cache.index}/%s", f"{cache.index}/%s.tail", f"{cache.trees}/%s.1"):
            os.link(path % "first", path % f"again-{number}")
    assert Evictor(cache, _limit(5 * MIB), set).look() == 0
    assert cache.objects.open(key, MIB) is not None


def test_layer_files_that_are_needed_leave_half_of_the_limit_to_contents(cache: Cache) -> None:
    keys = [_put(cache, n, MIB, age=3600 * (20 - n)) for n in range(10)]
    for number in range(10):
        _layer(cache, f"{number}", age=86400)

    def in_use() -> set[str]:
        return {*map(str, range(10)), *(f"{n}.1" for n in range(10))}

    before = _layers(cache)
    for _ in range(2):
        Evictor(cache, _limit(12 * MIB), in_use).look()
        assert _layers(cache) == before
        left = [cache.objects.open(key, MIB) is not None for key in keys]
        assert left == sorted(left)
        assert 4 <= left.count(True) <= 6


def test_layer_files_stay_if_nobody_knows_who_needs_them(cache: Cache) -> None:
    _layer(cache, "layer", age=86400)
    for in_use in (lambda: None, lambda: {"layer", "layer.1"}):
        assert Evictor(cache, _limit(MIB), in_use).look() == 0
        assert len(_layers(cache)) == 3
    Evictor(cache, _limit(MIB), lambda: ()).look()
    assert _layers(cache) == []


def test_a_new_layer_file_is_noticed_without_a_count(cache: Cache) -> None:
    _put(cache, 1, MIB, age=86400)
    evictor = Evictor(cache, _limit(3 * MIB), lambda: ())
    assert evictor.look() == 0
    _layer(cache, "layer", age=3 * 86400)
    assert evictor.look() >= 2 * MIB
    assert len(_layers(cache)) <= 1
    assert evictor.look() == 0
