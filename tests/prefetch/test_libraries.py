# SPDX-License-Identifier: Apache-2.0
"""What is fetched before the dynamic linker asks for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lazysnap.formats.elf import Span
from lazysnap.layers import links
from lazysnap.prefetch import libraries
from lazysnap.prefetch.libraries import Image, Libraries, may_link
from tests.support.elf import make_elf
from tests.support.indexes import index_of, resolve
from tests.support.layers import LayerEntry, directory, estargz, file, symlink

_MULTIARCH = "usr/lib/x86_64-linux-gnu"


class LocalBytes:
    """`Bytes` of a layer whose files are at hand."""

    def __init__(self, files: dict[int, bytes]) -> None:
        self._files = files
        self.fetched: list[Span] = []
        self.read_at: list[int] = []

    async def fetch(self, node: int, span: Span) -> None:
        self.fetched.append(span)

    async def read(self, node: int, span: Span) -> bytes:
        self.read_at.append(span.offset)
        return self._files[node][span.offset : span.offset + span.size]


class Tree:
    """An image, and what is wanted when its files are followed."""

    def __init__(self, *layers: Sequence[LayerEntry]) -> None:
        """Layers, the uppermost first; their slots are 10, 20 and so on."""
        indexes = [index_of(estargz(entries)) for entries in layers]
        self.image = Image([10 * n for n in range(1, len(layers) + 1)], indexes)
        self._layers = layers
        self.wanted: list[str] = []
        self.libraries = Libraries(self.image, self._want)

    def _want(self, slot: int, node: int) -> None:
        index = self.image.indexes[self.image.slots.index(slot)]
        self.wanted.append(f"{slot}:{index.path(node).decode()[1:]}")

    async def follow(self, path: str) -> LocalBytes:
        for slot, index, entries in zip(
            self.image.slots, self.image.indexes, self._layers, strict=True
        ):
            node = resolve(index, path)
            if node >= 0:
                data = next(entry.data for entry in entries if entry.path == path)
                source = LocalBytes({node: data})
                await self.libraries.follow(slot, node, source)
                return source
        raise AssertionError(path)


async def test_a_programs_linker_and_libraries_are_wanted_from_any_layer() -> None:
    program = make_elf(["libm.so.6", "libown.so.1", "libc.so.6"], interpreter="/lib64/ld.so.2")
    tree = Tree(
        [file("usr/bin/program", program), file("usr/local/lib/libown.so.1", b"own")],
        [symlink(f"{_MULTIARCH}/libm.so.6", "libm-2.36.so"), file(f"{_MULTIARCH}/libm-2.36.so")],
        [
            symlink("lib", "usr/lib"),
            symlink("lib64", "usr/lib64"),
            symlink("usr/lib64/ld.so.2", f"/{_MULTIARCH}/ld.so"),
            file(f"{_MULTIARCH}/ld.so", b"ld"),
            file(f"{_MULTIARCH}/libc.so.6", b"c"),
            file("usr/lib/libc.so.6", b"of another architecture"),
            file("etc/ld.so.cache", b"cache"),
        ],
    )
    source = await tree.follow("usr/bin/program")
    assert tree.wanted == [
        f"30:{_MULTIARCH}/ld.so",
        "30:etc/ld.so.cache",
        f"20:{_MULTIARCH}/libm-2.36.so",
        "10:usr/local/lib/libown.so.1",
        f"30:{_MULTIARCH}/libc.so.6",
    ]
    assert source.fetched == [Span(0, len(program))]


async def test_libraries_are_looked_for_beside_the_file_if_it_says_so() -> None:
    for runpath in ("$ORIGIN/../pack.libs", "${ORIGIN}/../pack.libs:/other", "/site/pack.libs"):
        tree = Tree(
            [
                file("site/pack/plugin.so", make_elf(["libblas.so.3"], runpath=runpath)),
                file("site/pack.libs/libblas.so.3", b"its own"),
                file("usr/lib/libblas.so.3", b"of the system"),
            ]
        )
        await tree.follow("site/pack/plugin.so")
        assert tree.wanted == ["10:site/pack.libs/libblas.so.3"]


async def test_a_library_that_is_named_by_its_path_is_not_looked_for() -> None:
    tree = Tree(
        [
            file("plugin.so", make_elf(["/opt/libx.so", "liby.so"])),
            file("opt/libx.so", b"x"),
            directory("usr/lib/liby.so"),
        ]
    )
    await tree.follow("plugin.so")
    assert tree.wanted == ["10:opt/libx.so"]


async def test_a_file_cannot_have_us_search_without_end() -> None:
    """By millions of directories, or by ones that become long: neither takes noticeable time or memory."""
    deep = "/".join(["d" * 250] * 15)
    needed = [f"lib{n}.so" for n in range(1000)]
    for runpath in ("a:" * (1 << 20), f"{'$ORIGIN' * 8000}:/own", ":".join(["/own"] * 30)):
        program = make_elf(needed, runpath=runpath, size=4 << 20)
        tree = Tree([file(f"{deep}/program", program), file("own/lib0.so", b"own")])
        await tree.follow(f"{deep}/program")
        assert tree.wanted == ["10:own/lib0.so"] * runpath.endswith("/own")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of all searches, but for those of whole images."""
    taken: list[int] = []
    take = links.Steps.take

    def counting(self: links.Steps, count: int = 1) -> None:
        if type(self) is not links.Steps:
            taken.append(count)
        take(self, count)

    monkeypatch.setattr(links.Steps, "take", counting)
    return taken


async def test_links_cannot_have_us_search_without_end(steps: list[int]) -> None:
    """Files of 24 KB, which took a minute of a CPU: forty links, and each leads there and back again."""
    chain = [symlink(f"L{n}", "d/../" * 700 + f"L{n + 1}") for n in range(40)]
    hostile = make_elf(["libfound.so", *["/L0"] * 999])
    names = [f"lib{n}.so" for n in range(4)]
    found = file("lib/libfound.so", b"found")
    tree = Tree([*[file(name, hostile) for name in names], directory("d"), *chain, found])
    for name in names:
        await tree.follow(name)
    assert tree.wanted == ["10:lib/libfound.so"] * 4
    assert len(steps) <= 4 * 10_001


async def test_all_files_of_an_image_have_a_budget_together(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_IMAGE_STEPS_MOST", 15_000)
    programs = [file(f"p{n}", make_elf([f"{n}/{m}.so" for m in range(1000)])) for n in range(20)]
    tree = Tree(programs)
    for program in programs:
        await tree.follow(program.path)
    assert len(steps) < 16_000


async def test_a_program_of_many_libraries_takes_a_part_of_its_budget(steps: list[int]) -> None:
    """Of an image of many layers, most of which have libraries."""
    needed = [f"lib{n}.so" for n in range(100)]
    others = [[file(f"{_MULTIARCH}/of{n}.so", b"x")] for n in range(15)]
    found = [file(f"{_MULTIARCH}/{name}", b"x") for name in needed]
    tree = Tree([file("program", make_elf(needed))], *others, [symlink("lib", "usr/lib"), *found])
    await tree.follow("program")
    assert len(tree.wanted) == 100
    assert sum(steps) < 5_000


async def test_of_a_large_library_only_what_loading_changes_is_fetched() -> None:
    size = 17 << 20
    tree = Tree([file("lib/liblarge.so", make_elf(["libc.so.6"], size=size))])
    source = await tree.follow("lib/liblarge.so")
    assert len(source.fetched) == 1
    assert source.fetched[0].offset > size - 4096
    assert max(source.read_at) == source.fetched[0].offset


async def test_files_that_are_no_programs_want_nothing() -> None:
    script = file("bin/script", b"#!/bin/sh\n" * 1000, mode=0o755)
    static = file("bin/static", make_elf([])[:100] + bytes(1000), mode=0o755)
    tree = Tree([script, static, file("lib/empty.so", b"\x7fELF")])
    for path in ("bin/script", "bin/static", "lib/empty.so"):
        source = await tree.follow(path)
        assert (tree.wanted, source.fetched) == ([], [])


def test_programs_and_libraries_are_known_by_mode_and_name() -> None:
    index = index_of(
        estargz([file("program", mode=0o755), file("a.so.1.2"), file("b.so"), file("c.py")])
    )
    found = {
        name: may_link(index, resolve(index, name))
        for name in ("program", "a.so.1.2", "b.so", "c.py")
    }
    assert found == {"program": True, "a.so.1.2": True, "b.so": True, "c.py": False}
