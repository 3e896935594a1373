# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import pytest

from lazysnap import labels, oci
from lazysnap.digest import Digest
from lazysnap.pull.present import is_impostor

_LAYER, _OTHER = str(Digest.of(b"layer")), str(Digest.of(b"other"))
_TOC, _FRAME = str(Digest.of(b"toc")), str(Digest.of(b"frame"))
_MANIFEST = str(Digest.of(b"manifest"))
_CHECKSUM = oci.ZSTD_CHUNKED_PREFIXES[0] + oci.ZSTD_CHUNKED_CHECKSUM


def _labels(**changed: Any) -> dict[str, str]:
    known: dict[str, Any] = {
        "chain_id": str(Digest.of(b"chain")),
        "reference": "registry.test/image:1",
        "manifest_digest": _MANIFEST,
        "layer_digests": [_LAYER],
        "size": 10,
        "media_type": oci.OCI_LAYER_GZIP,
        "annotations": {oci.TOC_DIGEST: _TOC},
    }
    return labels.layer_labels(**{**known, **changed})


def _lazy(found: dict[str, str]) -> dict[str, str]:
    return {**found, labels.REMOTE: "remote snapshot"}


_CRI = {
    labels.SNAPSHOT_REF: "chain",
    labels.CRI_IMAGE_REF: "registry.test/another:2",
    labels.CRI_LAYER_DIGEST: _LAYER,
}


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        (_labels(), _labels(), False),
        (_labels(), _labels(reference="other.test/image:1", manifest_digest=_OTHER), False),
        (_labels(), _labels(layer_digests=[_OTHER]), True),
        (_labels(), _labels(annotations={oci.TOC_DIGEST: _OTHER}), True),
        (_labels(annotations={}), _labels(), True),
        (_labels(), _labels(size=11), True),
        (_labels(annotations={_CHECKSUM: _FRAME}), _labels(annotations={_CHECKSUM: _FRAME}), False),
        (_labels(annotations={_CHECKSUM: _FRAME}), _labels(annotations={_CHECKSUM: _TOC}), True),
        # What CRI hands on, and what it does not
        (_labels(), {**_CRI, labels.STARGZ_TOC_DIGEST: _TOC}, False),
        (_labels(), _CRI, True),
        (_labels(), {**_CRI, labels.CRI_MANIFEST_DIGEST: _MANIFEST}, False),
        (_labels(), {**_CRI, labels.CRI_MANIFEST_DIGEST: _OTHER}, True),
        # Who is not of lazysnap
        (_labels(), {}, True),
        (_labels(), {labels.SNAPSHOT_REF: "chain"}, True),
    ],
)
def test_a_lazy_snapshot_is_of_the_same_layer(
    asked: dict[str, str], found: dict[str, str], expected: bool
) -> None:
    assert is_impostor(asked, _lazy(found)) == expected


def test_what_was_unpacked_was_compared_with_its_chain_id() -> None:
    assert not is_impostor(_labels(), _labels(layer_digests=[_OTHER]))
