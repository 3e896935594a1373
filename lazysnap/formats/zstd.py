# SPDX-License-Identifier: Apache-2.0
"""Zstandard frames, with a bound on what comes out.

A payload may span several frames, so decoding goes on across frames and steps over skippable ones
(RFC 8878). The decoder releases the GIL. Knows nothing of layers.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import zstandard

from lazysnap.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = 0x184D2A50
SKIPPABLE_HEADER = struct.Struct("<II")  # magic, length of the payload that follows

# What a level up to 22 without --long may ask for; the decoder allocates a window of this size.
_MAX_WINDOW = 1 << 27
# The reader allocates what it is asked for, so a claim is not believed further than this at once.
_STEP = 4 << 20


def inflate(data: Buffer, size: int) -> bytes:
    """Decode the first `size` bytes of the frames in `data`.

    Args:
        data: frames, or enough of their beginning.
        size: how many decoded bytes are wanted; never are more decoded or allocated.

    Returns:
        Exactly `size` bytes.

    Raises:
        FormatError: not zstd, or it holds fewer bytes.
    """
    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    parts: list[bytes] = []
    left = size
    try:
        with decoder.stream_reader(memoryview(data), read_across_frames=True) as reader:
            while left > 0 and (part := reader.read(min(left, _STEP))):
                parts.append(part)
                left -= len(part)
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd frame is damaged: {error}") from error
    if left > 0:
        raise FormatError(f"zstd frames hold {size - left} bytes, expected {size}")
    return parts[0] if len(parts) == 1 else b"".join(parts)
