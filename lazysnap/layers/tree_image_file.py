# SPDX-License-Identifier: Apache-2.0
"""An image of a tree as a file: written whole, and read only whole, as it ends with a checksum.

Knows nothing of trio, logs or the rest of the cache, as builders must start fast.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct

from isal import isal_zlib

from lazysnap.errors import Internal

_END = struct.Struct("<II")  # CRC32 and length of the image


def write_tree(path: str, image: bytes | bytearray) -> None:
    """Store an image.

    Raises:
        Internal: the disk refuses.
    """
    aside = f"{path}.new-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with open(aside, "wb") as file:
            file.write(image)
            file.write(_end(image))
        os.rename(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise Internal(f"cannot store {path}: {error.strerror}") from error


def read_tree(path: str) -> bytes | None:
    """A stored image; None if the file is not whole.

    Raises:
        OSError, ValueError: it cannot be read, or is empty.
    """
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as stored,
        memoryview(stored) as view,
        view[: -_END.size] as image,
    ):
        return bytes(image) if view[-_END.size :] == _end(image) else None


def _end(image: bytes | bytearray | memoryview) -> bytes:
    """The bytes that stand behind an image."""
    return _END.pack(isal_zlib.crc32(image), len(image) & 0xFFFFFFFF)
