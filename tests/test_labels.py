# SPDX-License-Identifier: Apache-2.0
"""Labels of all clients are read, and what our own client sends is read back.

The label sets are written out as the clients send them (containerd's CRI, ctr-remote), not made by
the code under test.
"""

from __future__ import annotations

import pytest

from lazysnap import labels
from lazysnap.digest import Digest
from lazysnap.errors import NotLazy

A, B, C = (Digest.of(text) for text in (b"a", b"b", b"c"))
CHAIN = "containerd.io/snapshot.ref"
S = "containerd.io/snapshot/"
CRI = {
    CHAIN: C,
    S + "cri.image-ref": "registry.example/app:1",
    S + "cri.layer-digest": A,
    S + "cri.manifest-digest": B,
    S + "cri.image-layers": f"{A},{B},{C}",
    S + "stargz/toc.digest": C,
}
RPULL = {
    CHAIN: C,
    S + "remote/stargz.reference": "registry.example/app:1",
    S + "remote/stargz.digest": A,
    S + "remote/stargz.layers": f"{A},{B}",
    S + "remote/stargz.prefetch": "10485760",
    S + "remote/stargz.skipverify": "true",
}


def test_cri() -> None:
    request = labels.parse_remote_request(CRI)
    assert request == labels.RemoteRequest(
        chain_id=C,
        reference="registry.example/app:1",
        layer_digest=A,
        manifest_digest=B,
        upper_layers=(B, C),
        annotations={S + "stargz/toc.digest": C},
        toc_digest=C,
    )


def test_rpull() -> None:
    request = labels.parse_remote_request(RPULL)
    assert request is not None
    assert (request.reference, request.layer_digest) == ("registry.example/app:1", A)
    assert (request.upper_layers, request.skip_verify) == ((B,), True)
    assert (request.manifest_digest, request.toc_digest) == (None, None)


@pytest.mark.parametrize("source", [CRI, RPULL])
def test_without_snapshot_ref_nothing_is_a_request(source: dict[str, str]) -> None:
    pod = {key: value for key, value in source.items() if key != CHAIN}
    assert labels.parse_remote_request(pod) is None
    assert labels.parse_remote_request(pod | {CHAIN: ""}) is None


@pytest.mark.parametrize(
    "source",
    [{CHAIN: A}, {CHAIN: A, S + "cri.image-ref": "x"}, {CHAIN: A, S + "remote/stargz.digest": A}],
)
def test_without_image_labels(source: dict[str, str]) -> None:
    with pytest.raises(NotLazy) as caught:
        labels.parse_remote_request(source)
    assert caught.value.reason == "no-image-labels"


@pytest.mark.parametrize("key", ["cri.layer-digest", "cri.manifest-digest", "stargz/toc.digest"])
@pytest.mark.parametrize("value", ["sha256:", "../../etc", "sha256:" + "g" * 64])
def test_malformed_digests_are_refused(key: str, value: str) -> None:
    with pytest.raises(NotLazy) as caught:
        labels.parse_remote_request(CRI | {S + key: value})
    assert caught.value.reason == "bad-image-labels"


@pytest.mark.parametrize("text", ["", ",", f"{A}", f"{A},,junk,{A}"])
def test_a_bad_list_of_layers_is_only_a_lost_hint(text: str) -> None:
    request = labels.parse_remote_request(CRI | {S + "cri.image-layers": text})
    assert request is not None
    assert request.upper_layers == ()


@pytest.mark.parametrize("text", ["-1", "1_000", " 5", "٣", "9" * 30, "x"])
def test_a_bad_size_counts_as_unknown(text: str) -> None:
    request = labels.parse_remote_request(CRI | {S + "lazysnap.layer-size": text})
    assert request is not None
    assert request.layer_size is None


def test_own_labels_come_back() -> None:
    zstd = {
        f"{prefix}.zstd-chunked.manifest-{key}": value
        for prefix in ("io.containers", "io.github.containers")
        for key, value in (("checksum", B), ("position", "1:2:3:1"))
    }
    made = labels.layer_labels(
        chain_id=C,
        reference="registry.example/app:1",
        manifest_digest=B,
        layer_digests=[A, B, C],
        size=12345,
        media_type="application/vnd.oci.image.layer.v1.tar+zstd",
        annotations={
            **zstd,
            "org.example.other": "stays behind",
            S + "stargz/toc.digest": C,
            S + "huge": "x" * 5000,
            S + "empty": "",
            CHAIN: "a hostile manifest",
            S + "cri.image-ref": "another.example/hostile:1",
        },
    )
    assert all(key == CHAIN or key.startswith(S) for key in made)
    assert all(value for value in made.values())
    assert S + "huge" not in made
    request = labels.parse_remote_request(made)
    assert request == labels.RemoteRequest(
        chain_id=C,
        reference="registry.example/app:1",
        layer_digest=A,
        layer_size=12345,
        media_type="application/vnd.oci.image.layer.v1.tar+zstd",
        manifest_digest=B,
        upper_layers=(B, C),
        annotations={**zstd, S + "stargz/toc.digest": C},
        toc_digest=C,
    )


def test_the_list_of_layers_is_cut_where_containerd_cuts_it() -> None:
    made = labels.layer_labels(
        chain_id=C,
        reference="x",
        manifest_digest=B,
        layer_digests=[Digest.of(str(n).encode()) for n in range(200)],
        size=1,
        media_type="t",
        annotations={},
    )
    layers = made[S + "cri.image-layers"].split(",")
    assert len(layers) == 56  # what containerd's own clients send at most
    assert layers[0] == Digest.of(b"0")
