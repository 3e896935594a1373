# SPDX-License-Identifier: Apache-2.0
"""What makes a lazy layer the one that it is, and the name of its index.

A lazy layer is the digest of its blob, the digest that is promised for its table of contents, the size of
the blob, and the place of that table. Only the second is checked before anything is read: nobody reads all
of a blob to check the first, and the rest is what a registry says. So what one repository says of a blob is
never believed for another. Each has an index of its own, which is a link to that of another repository if
both say the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence

from lazysnap import log
from lazysnap.digest import Digest
from lazysnap.errors import Internal
from lazysnap.formats.location import TocLocation
from lazysnap.index.reader import LayerIndex
from lazysnap.layers.tree_images import tree_name
from lazysnap.layers.view import open_index
from lazysnap.reference import Reference

_log = log.get(__name__)
_SEPARATOR = "-"


def index_name(layer: Digest, promise: str, reference: Reference) -> str:
    """The name of the index that a repository's blob has.

    Args:
        layer: digest of the blob.
        promise: of its annotations, see `lazysnap.oci.toc_promise`.
        reference: of any image in the repository.
    """
    repository = hashlib.sha256(f"{reference.host}/{reference.repository}".encode()).hexdigest()
    return _SEPARATOR.join((_stem(layer, promise), repository[:32]))


def _stem(layer: Digest, promise: str) -> str:
    """All of the name in old releases, which had one index for all repositories."""
    return f"{layer.hex}{_SEPARATOR}{hashlib.sha256(promise.encode()).hexdigest()}"


def size_of_known(path: str, expected: int | None, *, verified: bool) -> int | None:
    """The size of the blob that an index is of; None if the index is not there or of no use.

    Args:
        path: of the index.
        expected: what its manifest says of the size, if that is known.
        verified: whether the table of contents must have been checked against a digest.
    """
    if not os.path.exists(path):
        return None
    try:
        index = open_index(path)
    except Internal as error:
        _log.warning("index is made anew", error=error)
        return None
    size: int = index.blob_size
    if expected not in (None, size) or (verified and not index.verified):
        _log.warning("index does not fit its layer", index=path, size=size, expected=expected)
        return None
    return size


def other_indexes(directory: str, name: str, layer: Digest, promise: str) -> list[str]:
    """The indexes that other repositories' blobs have, by name.

    Args:
        directory: of all indexes.
        name: of this repository's index, which is left out.
        layer: digest of the blob.
        promise: of its annotations.
    """
    stem = _stem(layer, promise)
    found = []
    with contextlib.suppress(OSError), os.scandir(directory) as listing:
        for entry in listing:
            if not entry.name.startswith(stem) or entry.name == name or "." in entry.name:
                continue
            found.append(entry.name)
    return sorted(found)


def link_same(
    directory: str, name: str, others: Sequence[str], location: TocLocation, *, trees: str
) -> bool:
    """Take over the index of another repository's blob, if it is the one that would be built.

    Args:
        directory: of all indexes.
        name: of the index that is wanted.
        others: from `other_indexes`.
        location: of the table of contents, as this repository's blob says.
        trees: directory of tree images; empty if they are not needed.

    Returns:
        Whether the index is there now.
    """
    for other in others:
        try:
            index = open_index(os.path.join(directory, other))
        except Internal:
            continue
        if index.verified and _says(index, location):
            if not _link(os.path.join(directory, other), os.path.join(directory, name)):
                return False
            # Not the tail of the blob, which is as good as what that other repository sends.
            if trees:
                _link(*(os.path.join(trees, tree_name(each)) for each in (other, name)))
            return True
    return False


def _says(index: LayerIndex, location: TocLocation) -> bool:
    return (index.kind, index.compression, index.blob_size, index.toc_offset, index.data_end) == (
        location.kind,
        location.compression,
        location.blob_size,
        location.offset,
        location.data_end,
    )


def _link(source: str, target: str) -> bool:
    aside = f"{target}.new-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        os.link(source, aside)
    except OSError:
        return False
    try:
        os.rename(aside, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return False
    # If both are links to one file already, rename does nothing at all.
    with contextlib.suppress(OSError):
        os.unlink(aside)
    return True


def same_facts(path: str, other: str) -> bool:
    """Whether two indexes say the same of a blob; one that cannot be used says nothing.

    Args:
        path: of an index.
        other: of another index, with the same digest of the blob and the same promise in its name.
    """
    try:
        if os.path.samefile(path, other):
            return True
        one, two = open_index(path), open_index(other)
    except (OSError, Internal):
        return False
    return _facts(one) == _facts(two)


def _facts(index: LayerIndex) -> tuple[object, ...]:
    return (
        index.kind,
        index.compression,
        index.verified,
        index.toc_digest,
        index.blob_size,
        index.toc_offset,
        index.data_end,
    )
