# SPDX-License-Identifier: Apache-2.0
"""What is guessed from what readers had to wait for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lazysnap.fetch.fetcher import Plan
from lazysnap.fetch.members import filled, of_file
from lazysnap.prefetch.guesser import Guesser
from tests.support.indexes import counting, index_of, resolve
from tests.support.layers import LayerEntry, directory, estargz, file

_PADDING = 100_000


def _data(size: int) -> bytes:
    return random.Random(size).randbytes(size)


class Guesses:
    """A guesser of a layer, and what it has guessed."""

    def __init__(self, entries: Sequence[LayerEntry], chunk_size: int = 1 << 20) -> None:
        self.index = index_of(estargz(entries, chunk_size=chunk_size))
        self.plans: list[Plan] = []
        self._guesser = Guesser(self.index, self.plans.append)

    def missed(self, *paths: str) -> None:
        for path in paths:
            self._guesser.missed(resolve(self.index, path))

    def expect(self, *paths: str) -> None:
        self._guesser.expect(resolve(self.index, path) for path in paths)

    def take(self) -> list[str]:
        """Files that were guessed since the last call, in the order of their names."""
        nodes = {
            self.index.owner(chunk)
            for plan in self.plans
            for member in plan.members
            for chunk in self.index.member_chunks(member)
        }
        self.plans.clear()
        return sorted(self.index.path(node).decode()[1:] for node in nodes)


def _files(*paths: str, size: int = 10, mode: int = 0o644) -> list[LayerEntry]:
    """Files, each far from the next one, so that no gap between two is filled."""
    entries = []
    for path in paths:
        entries += [
            file(path, _data(size), mode=mode),
            file(path.replace(".", "_") + ".pad", _data(_PADDING)),
        ]
    return entries


def test_neighbours_of_the_same_kind_are_guessed_at_once() -> None:
    guesses = Guesses(_files("d/a.h", "d/b.h", "d/c.txt", "e/d.h"))
    guesses.missed("d/b.h")
    assert guesses.take() == ["d/a.h", "d/b.h"]


def test_the_nearest_are_guessed_first_and_more_when_more_is_needed() -> None:
    names = [f"d/{n:03}.h" for n in range(40)]
    guesses = Guesses([file(name, _data(100_000)) for name in names])
    guesses.missed(names[20])
    near = guesses.take()
    assert 5 <= len(near) <= 10
    assert near == [name for name in names if near[0] <= name <= near[-1]]
    assert names[20] in near[2:-2]
    guesses.missed(names[0])
    assert guesses.take() == names
    guesses.missed(names[1], names[2])
    assert guesses.take() == []


def test_not_all_of_a_huge_directory_is_looked_at() -> None:
    """Readers of all layers would have to wait meanwhile."""
    count = 12_000
    names = ["d/__init__.py", *(f"d/{n:05}.py" for n in range(count))]
    index = counting(estargz([file(name, b"%d" % n) for n, name in enumerate(names)]))
    plans: list[Plan] = []
    guesser = Guesser(index, plans.append)
    for number in (count // 2, count // 2 + 10):
        guesser.missed(resolve(index, names[number]))
    assert len(plans) == 3
    assert index.looks < 40_000


def test_nothing_is_guessed_from_what_a_profile_names() -> None:
    guesses = Guesses(_files("d/a.h", "d/b.h", "d/c.h"))
    guesses.expect("d/a.h")
    guesses.expect("d/b.h")
    guesses.missed("d/a.h", "d/b.h")
    assert guesses.plans == []
    guesses.missed("d/c.h")
    assert guesses.take() == ["d/a.h", "d/b.h", "d/c.h"]


def test_large_files_of_a_directory_are_not_guessed() -> None:
    entries = [*_files("d/a", "d/b"), file("d/large", _data(5 << 20)), directory("d/e")]
    guesses = Guesses(entries)
    guesses.missed("d/a", "d/b")
    assert guesses.take() == ["d/a", "d/b"]


def test_programs_and_libraries_say_nothing_of_their_neighbours() -> None:
    programs = _files("bin/cat", "bin/dog", "bin/eel", mode=0o755)
    libraries = _files("lib/ld.so.2", "lib/libc.so.6", "lib/libm.so", "lib/plugin.so")
    guesses = Guesses([*programs, *libraries])
    guesses.missed("bin/cat", "bin/dog", "bin/eel")
    guesses.missed("lib/ld.so.2", "lib/libc.so.6", "lib/libm.so")
    assert guesses.take() == []


def test_plugins_are_guessed_although_they_may_be_executable() -> None:
    guesses = Guesses(_files("d/a.cpython-311.so", "d/b.cpython-311.so", mode=0o755))
    guesses.missed("d/a.cpython-311.so")
    assert guesses.take() == ["d/a.cpython-311.so", "d/b.cpython-311.so"]


def _package(name: str, *below: str) -> list[str]:
    return [
        path
        for package in (name, *(f"{name}/{part}" for part in below))
        for path in (
            f"{package}/__init__.py",
            f"{package}/fast.cpython-311.so",
            f"{package}/__pycache__/__init__.cpython-311.pyc",
        )
    ]


def test_all_of_a_python_package_is_guessed_but_for_its_tests() -> None:
    package = _package("site/pack", "core", "core/deep", "io", "tests", "tests/more")
    guesses = Guesses(_files(*package, *_package("site/other"), "site/pack/data.csv"))
    guesses.missed("site/pack/io/__pycache__/__init__.cpython-311.pyc")
    wanted = [path for path in package if "tests" not in path and path.endswith((".pyc", ".so"))]
    assert guesses.take() == sorted(wanted)
    guesses.missed("site/pack/core/deep/__pycache__/__init__.cpython-311.pyc")
    (plan,) = guesses.plans  # of the directory
    assert plan.members == list(
        of_file(
            guesses.index,
            resolve(guesses.index, "site/pack/core/deep/__pycache__/__init__.cpython-311.pyc"),
        )
    )


def test_sources_of_a_package_are_guessed_only_if_sources_are_read() -> None:
    guesses = Guesses(_files(*_package("pack", "core", "io")))
    guesses.missed("pack/core/__init__.py")
    found = guesses.take()
    assert "pack/__init__.py" in found
    assert "pack/fast.cpython-311.so" in found
    assert not any(path.endswith(".pyc") for path in found)


def test_directories_of_modules_are_no_package() -> None:
    guesses = Guesses(_files(*_package("lib/one", "core"), *_package("lib/two", "core")))
    guesses.missed("lib/one/core/__init__.py")
    found = guesses.take()
    assert "lib/one/__init__.py" in found
    assert not any("two" in path for path in found)


def test_the_rest_of_a_program_is_guessed_from_its_second_part_on() -> None:
    guesses = Guesses(
        [
            file("bin/program", _data(3 << 20), mode=0o755),
            file("lib/libsmall.so", _data(3 << 20)),
            file("lib/liblarge.so", bytes(17 << 20)),
        ]
    )
    for name in ("bin/program", "lib/libsmall.so"):
        guesses.missed(name)
        assert guesses.plans == []
        guesses.missed(name)
        (plan,) = guesses.plans
        assert list(plan.members) == list(of_file(guesses.index, resolve(guesses.index, name)))
        assert guesses.take() == [name]
    guesses.missed("lib/liblarge.so", "lib/liblarge.so", "lib/liblarge.so")
    assert guesses.take() == []


def test_not_all_of_a_file_of_many_chunks_is_looked_at() -> None:
    data = _data(5 << 20)
    files = [file("data", data), file("d/a.h", data[: 4 << 20]), file("d/b.h", data[: 4 << 20])]
    index = counting(estargz(files, chunk_size=1024))
    plans: list[Plan] = []
    guesser = Guesser(index, plans.append)
    for path in ("data", "data", "d/a.h"):
        guesser.missed(resolve(index, path))
    assert index.looks < 5000
    assert sum(len(plan.members) for plan in plans) <= 4096


def test_packages_within_packages_are_followed_only_so_far() -> None:
    parts = ["p"] * 300
    names = ["/".join(parts[:n]) + "/__init__.py" for n in range(1, 300)]
    index = counting(estargz([file(name, b"x") for name in names]))
    guesser = Guesser(index, [].append)
    found = guesser._package(index.parent(resolve(index, names[-1])))
    assert found == resolve(index, "/".join(parts[: 299 - 63]))


def test_likelier_guesses_come_first_and_after_those_of_profiles() -> None:
    package = _package("pack", "core", "io")
    guesses = Guesses([*_files(*package), file("program", _data(2 << 20), mode=0o755)])
    guesses.missed("program", "program", "pack/__init__.py")
    rest, near, whole = guesses.plans
    hour = 3_600_000.0
    assert hour < near.next_wanted < whole.next_wanted < rest.next_wanted
    assert all(len(plan.wanted_at) == len(plan.members) for plan in guesses.plans)


def test_small_gaps_are_filled_and_large_ones_are_not() -> None:
    sizes = [10, 1000, 10, 100_000, 10]
    index = index_of(estargz([file(str(n), _data(size)) for n, size in enumerate(sizes)]))
    assert list(filled(index, [0, 2, 4], 64 << 10)) == [0, 1, 2, 4]
    assert list(filled(index, [], 10)) == []


def test_no_more_than_a_bounded_number_of_members_is_fetched_for_a_gap() -> None:
    index = index_of(estargz([file(f"{n:03}", b"%d" % n) for n in range(100)]))
    assert list(filled(index, [0, 99], 1 << 20)) == [0, 99]
    assert list(filled(index, [0, 60], 1 << 20)) == list(range(61))
