# SPDX-License-Identifier: Apache-2.0
"""What ELF files say of the libraries that they need."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import pytest

from lazysnap.errors import FormatError
from lazysnap.formats import elf
from lazysnap.formats.elf import HEAD_SIZE, Span, parse_dynamic, parse_head
from tests.support.elf import make_elf


def _part(data: bytes, span: Span | None) -> bytes:
    assert span is not None
    return data[span.offset : span.offset + span.size]


def _read(data: bytes) -> tuple[str, list[str], list[str]]:
    """Interpreter, libraries and paths of a file."""
    head = parse_head(data[:HEAD_SIZE])
    dynamic = parse_dynamic(head, _part(data, head.dynamic))
    interpreter = _part(data, head.interpreter).rstrip(b"\0") if head.interpreter else b""
    if dynamic is None:
        return interpreter.decode(), [], []
    strings = _part(data, dynamic.strings)
    return (
        interpreter.decode(),
        [elf.string(strings, at).decode() for at in dynamic.needed],
        [elf.string(strings, at).decode() for at in dynamic.paths],
    )


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_all_kinds_of_files_are_understood(wide: bool, order: str) -> None:
    needed = ["libm.so.6", "libc.so.6"]
    data = make_elf(
        needed, interpreter="/lib/ld.so", runpath="$ORIGIN/x:/y", wide=wide, order=order
    )
    assert _read(data) == ("/lib/ld.so", needed, ["$ORIGIN/x:/y"])
    (writable,) = parse_head(data[:HEAD_SIZE]).writable
    assert writable == parse_head(data[:HEAD_SIZE]).dynamic


def test_a_real_program_is_understood() -> None:
    interpreter, needed, _ = _read(Path("/bin/sh").read_bytes())
    assert Path(interpreter).name.startswith("ld-")
    assert any(name.startswith("libc.") for name in needed)


def test_a_file_that_needs_nothing_has_no_libraries() -> None:
    assert _read(make_elf([])) == ("", [], [])


@pytest.mark.parametrize(
    "data", [b"", b"\x7fEL", b"#!/bin/sh\n", b"\x7fELF\x02", b"\x7fELF\x03\x01"]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_head(data)


@pytest.mark.parametrize("table", [5000, 1 << 40, 1 << 63])
def test_headers_beyond_the_head_are_refused(table: int) -> None:
    data = bytearray(make_elf(["libc.so.6"]))
    struct.pack_into("<Q", data, 32, table)
    with pytest.raises(FormatError):
        parse_head(bytes(data[:HEAD_SIZE]))


def test_a_huge_dynamic_section_is_refused() -> None:
    data = bytearray(make_elf(["libc.so.6"]))
    (at,) = struct.unpack_from("<Q", data, 32)
    struct.pack_into("<Q", data, at + 2 * 56 + 32, 1 << 40)  # the third header is that section's
    with pytest.raises(FormatError):
        parse_head(bytes(data[:HEAD_SIZE]))


def test_a_string_table_that_is_nowhere_or_huge_is_refused() -> None:
    data = make_elf(["libc.so.6"])
    head = parse_head(data[:HEAD_SIZE])
    for table, size in ((1 << 50, 10), (0x400000, 1 << 30)):
        entries = [(1, 1), (5, table), (10, size), (0, 0)]
        with pytest.raises(FormatError):
            parse_dynamic(head, b"".join(struct.pack("<QQ", *entry) for entry in entries))


def test_headers_that_overlap_are_refused() -> None:
    data = bytearray(make_elf(["libc.so.6"]))
    struct.pack_into("<HH", data, 54, 0, 65535)
    with pytest.raises(FormatError):
        parse_head(bytes(data[:HEAD_SIZE]))


def test_more_lists_of_directories_than_a_linker_writes_are_refused() -> None:
    data = make_elf(["libc.so.6"])
    head = parse_head(data[:HEAD_SIZE])
    entries = [(1, 1), *[(29, 1)] * 1000, (5, 0x400000), (10, 10), (0, 0)]
    with pytest.raises(FormatError):
        parse_dynamic(head, b"".join(struct.pack("<QQ", *entry) for entry in entries))


def test_strings_outside_the_table_are_empty() -> None:
    assert [elf.string(b"\0ab\0c", at) for at in (1, 2, 4, 9)] == [b"ab", b"b", b"", b""]
    assert elf.string(bytes(1) + b"x" * (1 << 20) + b"\0", 1) == b""


def test_damaged_files_raise_nothing_else() -> None:
    source = random.Random(1)
    whole = make_elf(["liba.so", "libb.so"], interpreter="/lib/ld.so", size=2000)
    for _ in range(2000):
        data = bytearray(whole[: source.choice([len(whole), source.randrange(1, len(whole))])])
        for _ in range(3):
            data[source.randrange(len(data))] = source.randrange(256)
        with contextlib.suppress(FormatError, UnicodeDecodeError, AssertionError):
            _read(bytes(data))
