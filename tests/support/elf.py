# SPDX-License-Identifier: Apache-2.0
"""Writes ELF files that say which libraries they need, and nothing else; for tests only.

After elf(5): the file header, program headers, the string table, then far away the dynamic section.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_ADDRESS = 0x400000


def make_elf(
    needed: Sequence[str],
    *,
    interpreter: str = "",
    runpath: str = "",
    size: int = 1 << 16,
    wide: bool = True,
    order: str = "<",
) -> bytes:
    """A program or a library.

    Args:
        needed: names of libraries.
        interpreter: path of the dynamic linker.
        runpath: where libraries are searched.
        size: of the file, in bytes; the dynamic section is at its end.
        wide: 64 bits.
        order: of bytes, as in the module struct.
    """
    word = "Q" if wide else "I"
    strings = b"\0"
    offsets = {}
    for text in (*needed, runpath):
        offsets[text] = len(strings)
        strings += text.encode() + b"\0"
    path = interpreter.encode() + b"\0" if interpreter else b""
    head_size, entry_size = (64, 56) if wide else (52, 32)
    path_at = head_size + 4 * entry_size
    strings_at = path_at + len(path)
    tags = [(1, offsets[name]) for name in needed]
    tags += [(29, offsets[runpath])] if runpath else []
    tags += [(5, _ADDRESS + strings_at), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack(order + word * 2, *tag) for tag in tags)
    dynamic_at = size - len(dynamic)

    def segment(kind: int, flags: int, offset: int, length: int) -> bytes:
        address = _ADDRESS + offset
        if wide:
            fields = (kind, flags, offset, address, address, length, length, 1)
            return struct.pack(order + "IIQQQQQQ", *fields)
        fields = (kind, offset, address, address, length, length, flags, 1)
        return struct.pack(order + "8I", *fields)

    segments = [
        segment(1, 5, 0, dynamic_at),
        segment(1, 6, dynamic_at, len(dynamic)),
        segment(2, 6, dynamic_at, len(dynamic)),
        segment(3, 4, path_at, len(path)) if path else segment(0, 0, 0, 0),
    ]
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    counts = (head_size, entry_size, len(segments), 64 if wide else 40, 0, 0)
    head = ident + struct.pack(
        order + "HHI" + word * 3 + "I6H", 3, 62, 1, 0, head_size, 0, 0, *counts
    )
    begin = head + b"".join(segments) + path + strings
    assert len(head) == head_size
    assert len(begin) <= dynamic_at
    # Not zeros, of which an image needs no bytes.
    return begin + b"\xcc" * (dynamic_at - len(begin)) + dynamic
