# SPDX-License-Identifier: Apache-2.0
"""Whether this node's kernel can serve the trees of layers by itself, found by doing it.

That takes an EROFS image in a file (Linux 6.12) and overlay with data-only lower directories (6.5).
Blocks. Leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile

from lazysnap import mounts
from lazysnap.erofs.image import build as build_image
from lazysnap.errors import Internal, LazysnapError
from lazysnap.formats.location import TocLocation
from lazysnap.formats.verify import trust_unverified_toc
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex

_DATA = b"served by the kernel\n"


def mount_tree(image: str, mountpoint: str) -> None:
    """Show the tree of a layer.

    Args:
        image: file with an EROFS image.
        mountpoint: an existing directory.

    Raises:
        Internal: the kernel refused.
    """
    mounts.mount(image, mountpoint, "erofs", mounts.MS_RDONLY)


def why_not(directory: str) -> str:
    """Why trees cannot be served by the kernel; empty if they can.

    Args:
        directory: writable, on the file system of the cache.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="new-probe-", dir=directory) as probe:
            return _try(probe)
    except (OSError, LazysnapError) as error:
        return str(error)


def _try(probe: str) -> str:
    places = [os.path.join(probe, name) for name in ("tree", "lower", "merged", "objects")]
    tree, lower, merged, objects = places
    digest = hashlib.sha256(_DATA).hexdigest()
    for place in (*places, os.path.join(objects, digest[:2])):
        os.mkdir(place)
    with open(os.path.join(objects, digest[:2], digest), "wb") as file:
        file.write(_DATA)
    image = os.path.join(probe, "image")
    with open(image, "wb") as file:
        file.write(build_image(_index(digest)))
    try:
        mount_tree(image, tree)
        options = f"metacopy=on,lowerdir={tree}:{lower}::{objects}"
        mounts.mount("overlay", merged, "overlay", mounts.MS_RDONLY, options)
        with open(os.path.join(merged, "file"), "rb") as file:
            return "" if file.read() == _DATA else "overlay does not show the data"
    finally:
        for place in (merged, tree):
            with contextlib.suppress(Internal):
                mounts.unmount(place)


def _index(digest: str) -> LayerIndex:
    """Of a layer with one file."""
    entry = {"name": "file", "type": "reg", "size": len(_DATA), "chunkDigest": f"sha256:{digest}"}
    table = json.dumps({"version": 1, "entries": [entry]}).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("stargz.index.json")
        member.size = len(table)
        tar.addfile(member, io.BytesIO(table))
    compressed = gzip.compress(packed.getvalue())
    location = TocLocation("estargz", "gzip", 1 << 20, 1 << 10, len(compressed), None, 1 << 10)
    return LayerIndex(encode(build(trust_unverified_toc(location, compressed))))
