# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.layerstore.information import position

_TOC, _FRAME, _CLAIMED = (str(Digest.of(data)) for data in (b"toc", b"frame", b"claimed"))
_CONTAINERS, _STARGZ = (prefix + oci.ZSTD_CHUNKED_CHECKSUM for prefix in oci.ZSTD_CHUNKED_PREFIXES)


def _position(annotations: dict[str, str], digest: str) -> int | None:
    layers = tuple(
        oci.Descriptor(
            media_type=oci.OCI_LAYER_ZSTD, digest=Digest.of(data), size=1, annotations=each
        )
        for data, each in ((b"lower", {}), (b"upper", annotations))
    )
    config = oci.Descriptor(media_type=oci.OCI_CONFIG, digest=Digest.of(b"config"), size=1)
    return position(oci.Manifest(schema_version=2, config=config, layers=layers), digest)


@pytest.mark.parametrize(
    ("annotations", "digest"),
    [
        ({oci.TOC_DIGEST: _TOC}, _TOC),
        ({_CONTAINERS: _FRAME}, _FRAME),
        ({oci.TOC_DIGEST: _TOC, _STARGZ: _FRAME}, _TOC),
        ({}, str(Digest.of(b"upper"))),
    ],
)
def test_a_layer_is_found_by_what_is_checked_of_it(
    annotations: dict[str, str], digest: str
) -> None:
    assert _position(annotations, digest) == 1


@pytest.mark.parametrize(
    "annotations",
    [
        {oci.TOC_DIGEST: _TOC, _CONTAINERS: _CLAIMED},
        {_STARGZ: _FRAME, _CONTAINERS: _CLAIMED},
        {oci.TOC_DIGEST: _CLAIMED + "0"},
        {},
    ],
)
def test_a_digest_that_nobody_checks_leads_to_no_layer(annotations: dict[str, str]) -> None:
    """Clients would keep the layer under it, in the place of the one that has it."""
    assert _position(annotations, _CLAIMED) is None
