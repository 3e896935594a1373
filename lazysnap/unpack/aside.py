# SPDX-License-Identifier: Apache-2.0
"""Brings a layer that was unpacked aside to its place, once the layers below it are there.

A layer can be unpacked before it is known what lies below it: alone (`Options.alone`), into a directory
that belongs to no snapshot. In its turn its files are renamed into the directory of its snapshot, and
what it needs from the layers below is added.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from lazysnap.errors import Internal
from lazysnap.unpack.applier import Whiteouts, inherit, opaque_mark


def bring(
    source: str,
    target: str,
    *,
    lowers: Sequence[str],
    left_out: Sequence[bytes],
    whiteouts: Whiteouts,
) -> None:
    """Move a layer that was applied alone to its place, and finish it.

    Args:
        source: the directory that it was applied to; empty afterwards.
        target: an empty directory of the same file system.
        lowers: directories of the layers below, nearest first.
        left_out: as it was told when the layer was applied.
        whiteouts: as it was applied.

    Raises:
        Internal: the system refused; some of it may be there.
    """
    _move(source, target, opaque_mark(whiteouts))
    inherit(target, lowers, left_out, whiteouts)


def _move(source: str, target: str, opaque: bytes) -> None:
    """Rename everything in a directory into another one, its overlay mark included."""
    try:
        with contextlib.suppress(OSError):  # it has none
            os.setxattr(target, opaque, os.getxattr(source, opaque))
        for name in os.listdir(os.fsencode(source)):
            os.rename(
                os.path.join(os.fsencode(source), name), os.path.join(os.fsencode(target), name)
            )
    except OSError as error:
        raise Internal(f"{source} cannot be moved to {target}: {error.strerror}") from error
