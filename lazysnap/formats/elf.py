# SPDX-License-Identifier: Apache-2.0
"""What an ELF file says of the files that the dynamic linker will load with it.

A file is read in three steps, as its parts may have to be fetched: the head, the dynamic section, the
string table. Nothing is trusted: offsets only say which bytes to read next. See elf(5) and ld.so(8).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from lazysnap.errors import FormatError

HEAD_SIZE = 4096
"""Bytes from the beginning of a file that are enough for `parse_head` of any usual one."""
# More than any linker writes; what is larger is not worth reading.
_DYNAMIC_MOST = 64 << 10
_STRINGS_MOST = 16 << 20
_NEEDED_MOST = 1000
_PATHS_MOST = 2
_STRING_MOST = 64 << 10

_MAGIC = b"\x7fELF"
_LOAD, _DYNAMIC, _INTERPRETER = 1, 2, 3
_WRITABLE = 2
_NEEDED, _STRINGS, _STRINGS_SIZE, _RPATH, _RUNPATH = 1, 5, 10, 15, 29


class Span(NamedTuple):
    """A range of a file, in bytes."""

    offset: int
    size: int


class _Load(NamedTuple):
    address: int
    span: Span


@dataclass(frozen=True, slots=True)
class Head:
    """What the head of an ELF file tells.

    Attributes:
        dynamic: where its dynamic section is; None if it is linked statically.
        interpreter: where the path of its dynamic linker is; None for most libraries.
        writable: what is copied into memory and changed while it is loaded.
    """

    dynamic: Span | None
    interpreter: Span | None
    writable: tuple[Span, ...]
    loads: tuple[_Load, ...]
    order: str
    wide: bool


@dataclass(frozen=True, slots=True)
class Dynamic:
    """What the dynamic section tells; names are offsets in the string table.

    Attributes:
        strings: where the string table is.
        needed: names of libraries.
        paths: lists of directories to search for them, one of each of the two kinds at the most.
    """

    strings: Span
    needed: tuple[int, ...]
    paths: tuple[int, ...]


def parse_head(data: bytes) -> Head:
    """Parse the beginning of a file.

    Args:
        data: the first `HEAD_SIZE` bytes, or all of a smaller file.

    Raises:
        FormatError: not an ELF file, or not a usual one.
    """
    if data[:4] != _MAGIC or len(data) < 6 or data[4] not in (1, 2) or data[5] not in (1, 2):
        raise FormatError("not an ELF file")
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    try:
        (table,) = struct.unpack_from(order + ("Q" if wide else "I"), data, 32 if wide else 28)
        entry_size, count = struct.unpack_from(order + "HH", data, 54 if wide else 42)
        # Entries do not overlap, so few of them fit into the head.
        if table > len(data) or entry_size < (56 if wide else 32):
            raise FormatError("no program headers in an ELF file's head")
        entries = [_program_entry(data, table + n * entry_size, order, wide) for n in range(count)]
    except struct.error as error:
        raise FormatError(f"no program headers in an ELF file's head: {error}") from error

    def first(kind: int) -> Span | None:
        return next((span for k, _, _, span in entries if k == kind), None)

    dynamic = first(_DYNAMIC)
    if dynamic is not None and dynamic.size > _DYNAMIC_MOST:
        raise FormatError(f"an ELF file with a dynamic section of {dynamic.size} bytes")
    return Head(
        dynamic=dynamic,
        interpreter=first(_INTERPRETER),
        writable=tuple(
            span for kind, flags, _, span in entries if kind == _LOAD and flags & _WRITABLE
        ),
        loads=tuple(_Load(address, span) for kind, _, address, span in entries if kind == _LOAD),
        order=order,
        wide=wide,
    )


def _program_entry(data: bytes, at: int, order: str, wide: bool) -> tuple[int, int, int, Span]:
    """Type, flags, address and place in the file of a segment."""
    if wide:
        kind, flags, offset, address, _, size = struct.unpack_from(order + "IIQQQQ", data, at)
    else:
        kind, offset, address, _, size, _, flags = struct.unpack_from(order + "7I", data, at)
    return kind, flags, address, Span(offset, size)


def parse_dynamic(head: Head, data: bytes) -> Dynamic | None:
    """Parse the dynamic section.

    Args:
        head: of the file.
        data: the bytes at `head.dynamic`.

    Returns:
        None if the file needs no other one.

    Raises:
        FormatError: it is damaged.
    """
    entry = struct.Struct(head.order + ("QQ" if head.wide else "II"))
    needed: list[int] = []
    paths: list[int] = []
    table = size = 0
    for tag, value in entry.iter_unpack(data[: len(data) // entry.size * entry.size]):
        if tag == 0:
            break
        if tag == _NEEDED:
            needed.append(value)
            if len(needed) > _NEEDED_MOST:
                break
        elif tag in (_RPATH, _RUNPATH):
            paths.append(value)
        elif tag == _STRINGS:
            table = value
        elif tag == _STRINGS_SIZE:
            size = value
    if not needed:
        return None
    for address, span in head.loads:
        if address <= table < address + span.size:
            strings = Span(span.offset + table - address, size)
            if size > _STRINGS_MOST or len(needed) > _NEEDED_MOST or len(paths) > _PATHS_MOST:
                break
            return Dynamic(strings, tuple(needed), tuple(paths))
    raise FormatError("an ELF file without a fair string table")


def string(strings: bytes, at: int) -> bytes:
    """The string at an offset of a string table; empty if there is none, or it is far too long."""
    end = strings.find(b"\0", at, at + _STRING_MOST)
    return strings[at:end] if 0 <= at <= end else b""
