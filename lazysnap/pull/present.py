# SPDX-License-Identifier: Apache-2.0
"""Which layer a lazy snapshot is of that containerd has under the chain id of a layer.

containerd finds snapshots by their chain ids. Whoever unpacks a layer compares the chain id with the files;
of a lazy layer it is only what the configuration of its image claims. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping

from lazysnap import labels as names
from lazysnap import oci
from lazysnap.errors import LazysnapError


def is_impostor(asked: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether a snapshot may be a lazy one of another layer than the one that is asked for.

    Args:
        asked: labels by which a layer is asked for, from `lazysnap.labels.layer_labels`.
        found: labels of the snapshot that has the layer's chain id.
    """
    return names.REMOTE in found and not _is_same(asked, found)


def _is_same(asked: Mapping[str, str], found: Mapping[str, str]) -> bool:
    try:
        wanted, there = names.parse_remote_request(asked), names.parse_remote_request(found)
    except LazysnapError:
        return False
    if wanted is None or there is None or wanted.layer_digest != there.layer_digest:
        return False
    if None not in (wanted.layer_size, there.layer_size) and wanted.layer_size != there.layer_size:
        return False
    promise = oci.toc_promise(there.annotations)
    if promise:
        return promise == oci.toc_promise(wanted.annotations)
    return there.manifest_digest is not None and there.manifest_digest == wanted.manifest_digest
