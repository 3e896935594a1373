# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lazysnap.errors import FormatError
from lazysnap.formats import tar


def _sums(block: bytes) -> tuple[int, int]:
    """The checksums that POSIX and that some old writers would put into a header."""
    blanked = block[:148] + b" " * 8 + block[156:]
    return sum(blanked), sum(byte - 256 * (byte > 127) for byte in blanked)


@settings(deadline=None)
@given(st.binary(min_size=tar.BLOCK, max_size=tar.BLOCK), st.integers(1, 130_000))
@example(b"\xff" * tar.BLOCK, 1)
@example(b"\xff" * tar.BLOCK, 65_521)
@example(b"\0" * tar.BLOCK, 65_521)
def test_a_header_has_its_checksum(block: bytes, other: int) -> None:
    right = _sums(block)
    for claimed in (right[0], right[1], right[0] - other, right[0] + other):
        if claimed < 0:
            continue
        field = b"%07o\0" % claimed
        header = block[:148] + field + block[156:]
        try:
            tar.parse_header(header)
            accepted = True
        except FormatError as error:  # of another field, perhaps
            accepted = "checksum" not in error.message
        assert accepted == (claimed in right)
