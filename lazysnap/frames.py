# SPDX-License-Identifier: Apache-2.0
"""Messages between processes, as bytes: a 4-byte big-endian length and a msgpack map.

Does no I/O; `lazysnap.channel` carries them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgpack

from lazysnap import errors
from lazysnap.errors import LazysnapError, Unavailable

LENGTH = struct.Struct(">I")
MAX_FRAME = 64 << 20


def pack(message: Mapping[str, Any]) -> bytes:
    """One frame with this message."""
    body: bytes = msgpack.packb(message)
    return LENGTH.pack(len(body)) + body


def length(head: bytes) -> int:
    """How many bytes follow the first four of a frame.

    Raises:
        Unavailable: more than a frame of ours may have.
    """
    (count,) = LENGTH.unpack(head)
    if count > MAX_FRAME:
        raise Unavailable(f"a frame of {count} bytes is not one of ours")
    return int(count)


def unpack(body: bytes) -> dict[str, Any]:
    """The message in what follows a frame's length.

    Raises:
        Unavailable: it holds none.
    """
    try:
        message = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Unavailable(f"a frame that is not msgpack: {error}") from error
    if not isinstance(message, dict):
        raise Unavailable("a frame that holds no map")
    return message


def pack_error(error: LazysnapError) -> dict[str, Any]:
    """The map that stands for an error in an answer."""
    return {
        "class": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "reason": error.reason,
    }


def unpack_error(packed: Mapping[str, Any]) -> LazysnapError:
    """The error that `pack_error` made this from."""
    return errors.rebuilt(
        str(packed.get("class")),
        str(packed.get("message")),
        packed.get("hint"),
        packed.get("reason"),
    )
