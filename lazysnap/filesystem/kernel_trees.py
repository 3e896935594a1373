# SPDX-License-Identifier: Apache-2.0
"""Whether this node's kernel can serve the trees of layers by itself, found by doing it.

That takes EROFS images in files (Linux 6.12), an overlay of them with data-only lower directories (6.8
for its mount interface), and a writable overlay on top of that: some kernels count that as one file
system too many on top of each other. Blocks. Leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence

from lazysnap import mounts
from lazysnap.erofs.image import build as build_image
from lazysnap.errors import Internal, LazysnapError
from lazysnap.formats.location import TocLocation
from lazysnap.formats.verify import trust_unverified_toc
from lazysnap.fsconfig import mount_read_only_overlay
from lazysnap.index.build import build
from lazysnap.index.codec import encode
from lazysnap.index.reader import LayerIndex

_PREFIX = "new-probe-"
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


def merge_trees(lower: Sequence[str], data: Sequence[str], source: str, target: str) -> None:
    """Show the layers of an image as one, read-only, with the bytes of their files.

    The files of a tree are what overlay calls metacopy, and only its option `metacopy` lets it look for
    the bytes of files of other layers than the lowest one. On what is writable the option would change
    what an upper directory holds, which is why this is a mount of its own. `xino` gives the files of
    different layers different inode numbers, as the overlay above cannot tell their devices apart.

    Args:
        lower: trees and directories of layers, uppermost first.
        data: where the bytes are, in the order in which they are looked for.
        source: what the list of mounts says.
        target: an existing directory.

    Raises:
        Internal: the kernel refused.
    """
    options = (("metacopy", "on"), ("xino", "on"), ("source", source))
    mount_read_only_overlay(lower, data, options, target)


def clean(directory: str) -> None:
    """Remove what a process left that was killed while it tried.

    Args:
        directory: where it tried; nobody may do so at the moment.

    Raises:
        LazysnapError: something stays mounted.
        OSError: the directory cannot be read.
    """
    for name in os.listdir(directory):
        if name.startswith(_PREFIX):
            probe = os.path.join(os.path.realpath(directory), name)
            mounts.unmount_below(probe)
            shutil.rmtree(probe, ignore_errors=True)


def why_not(directory: str) -> str:
    """Why trees cannot be served by the kernel; empty if they can.

    Args:
        directory: writable, on the file system of the cache.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as probe:
            return _try(probe)
    except (OSError, LazysnapError) as error:
        return str(error)


def _try(probe: str) -> str:
    names = ("tree", "lower", "merged", "objects", "upper", "work", "top")
    places = {name: os.path.join(probe, name) for name in names}
    digest = hashlib.sha256(_DATA).hexdigest()
    for place in (*places.values(), os.path.join(places["objects"], digest[:2])):
        os.mkdir(place)
    with open(os.path.join(places["objects"], digest[:2], digest), "wb") as file:
        file.write(_DATA)
    image = os.path.join(probe, "image")
    with open(image, "wb") as file:
        file.write(build_image(_index(digest)))
    top = places["top"]
    try:
        mount_tree(image, places["tree"])
        lower = (places["tree"], places["lower"])
        merge_trees(lower, (places["objects"],), "lazysnap", places["merged"])
        options = "lowerdir={merged},upperdir={upper},workdir={work}".format_map(places)
        mounts.mount("overlay", top, "overlay", data=options)
        with open(os.path.join(top, "file"), "rb") as file:
            return "" if file.read() == _DATA else "overlay does not show the data"
    finally:
        for name in ("top", "merged", "tree"):
            with contextlib.suppress(Internal):
                mounts.unmount(places[name])


def _index(digest: str) -> LayerIndex:
    """The index of a layer with one file."""
    entry = {"name": "file", "type": "reg", "size": len(_DATA), "chunkDigest": f"sha256:{digest}"}
    table = json.dumps({"version": 1, "entries": [entry]}).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("stargz.index.json")
        member.size = len(table)
        tar.addfile(member, io.BytesIO(table))
    compressed = gzip.compress(packed.getvalue())
    location = TocLocation(
        kind="estargz",
        compression="gzip",
        blob_size=1 << 20,
        offset=1 << 10,
        length=len(compressed),
        uncompressed_length=None,
        data_end=1 << 10,
    )
    return LayerIndex(encode(build(trust_unverified_toc(location, compressed))))
