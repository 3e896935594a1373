# SPDX-License-Identifier: Apache-2.0
"""Manifests, indexes, configurations and platforms."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazysnap import oci
from lazysnap.digest import Digest
from lazysnap.errors import FormatError, InvalidArgument, LazysnapError, RegistryNotFound
from lazysnap.oci import LayerKind
from lazysnap.platforms import Platform

SHA = "sha256:" + "a" * 64
LAYER = {"mediaType": oci.OCI_LAYER_GZIP, "digest": SHA, "size": 10}
CONFIG = {"mediaType": oci.OCI_CONFIG, "digest": SHA, "size": 2}
MANIFEST = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER]}


def dump(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_manifest() -> None:
    annotated = LAYER | {"annotations": {oci.TOC_DIGEST: SHA}, "urls": None, "unknown": {"x": 1}}
    manifest = oci.parse_manifest(dump(MANIFEST | {"layers": [annotated], "annotations": None}))
    layer = manifest.layer(SHA)
    assert isinstance(layer.digest, Digest)
    assert (layer.size, layer.annotation(oci.TOC_DIGEST), layer.annotation("x")) == (10, SHA, None)
    assert manifest.annotation("x") is None
    with pytest.raises(RegistryNotFound):
        manifest.layer(Digest.of(b""))


def test_manifest_without_layers_as_go_writes_it() -> None:
    manifest = oci.parse_manifest(dump(MANIFEST | {"layers": None, "manifests": None}))
    assert not manifest.layers


@pytest.mark.parametrize(
    "document",
    [
        None, [], 5, {}, {"schemaVersion": 2, "layers": 7, "config": CONFIG},
        MANIFEST | {"schemaVersion": 1}, MANIFEST | {"schemaVersion": "2"},
        MANIFEST | {"config": None, "fsLayers": []}, {"schemaVersion": 1, "fsLayers": []},
        MANIFEST | {"manifests": []},
        {"schemaVersion": 2, "manifests": [], "layers": []},
        MANIFEST | {"mediaType": oci.OCI_INDEX},
        MANIFEST | {"layers": [LAYER | {"size": -1}]},
        MANIFEST | {"layers": [LAYER | {"size": 1 << 63}]},
        MANIFEST | {"layers": [LAYER | {"size": 1.5}]},
        MANIFEST | {"layers": [LAYER | {"size": None}]},
        MANIFEST | {"layers": [LAYER | {"digest": "sha256:../../../x"}]},
        MANIFEST | {"layers": [LAYER | {"digest": 5}]},
        MANIFEST | {"layers": [LAYER | {"annotations": {"x": 1}}]},
        MANIFEST | {"layers": [{}]},
        {"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "manifests": []},
    ],
)  # fmt: skip
def test_malformed_documents(document: Any) -> None:
    with pytest.raises(FormatError):
        oci.parse_document(dump(document))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 1_000_000, b" " * (9 << 20)])
def test_malformed_bytes(data: bytes) -> None:
    for parse in (oci.parse_document, oci.parse_config, oci.parse_index, oci.parse_manifest):
        with pytest.raises(FormatError):
            parse(data)


def test_declared_type_must_be_right() -> None:
    for media_type in oci.INDEX_TYPES:
        with pytest.raises(FormatError):
            oci.parse_document(dump(MANIFEST), media_type)
    for media_type in (*oci.MANIFEST_TYPES, "", "application/json"):
        assert isinstance(oci.parse_document(dump(MANIFEST), media_type), oci.Manifest)
    with pytest.raises(FormatError):
        oci.parse_index(dump(MANIFEST))
    with pytest.raises(FormatError):
        oci.parse_manifest(dump({"schemaVersion": 2, "manifests": []}))


_MEMBERS = st.sampled_from(
    (*MANIFEST, *LAYER, "manifests", "platform", "rootfs", "diff_ids", "annotations")
)
_JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.just(2) | st.just(SHA),
    lambda inner: st.lists(inner) | st.dictionaries(_MEMBERS, inner),
)


@given(_JSON)
def test_any_json_is_read_or_refused(document: Any) -> None:
    for parse in (oci.parse_document, oci.parse_config):
        try:
            parse(dump(document))
        except LazysnapError as error:
            assert isinstance(error, FormatError)  # anything else fails the test


def test_config_and_chain_ids() -> None:
    first, second = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    config = oci.parse_config(
        dump({"os": "linux", "architecture": "arm64", "variant": "v8", "config": {"Cmd": None},
              "rootfs": {"type": "layers", "diff_ids": [first, second]}})
    )  # fmt: skip
    assert config.platform == Platform("linux", "arm64")
    assert config.chain_ids() == [
        first,
        # printf 'sha256:11..1 sha256:22..2' | sha256sum
        "sha256:9932074217c35353d2e03a3f5a86549f7c67bfeb0ba53e23d69f4d4c8f7958f5",
    ]
    manifest = oci.parse_manifest(dump(MANIFEST))
    with pytest.raises(FormatError, match="1 layers and 2"):
        oci.check_layers(manifest, config)


@pytest.mark.parametrize(
    ("media_type", "kind"),
    [
        (oci.OCI_LAYER_GZIP, LayerKind.GZIP),
        (oci.DOCKER_LAYER_GZIP, LayerKind.GZIP),
        (oci.OCI_LAYER_ZSTD, LayerKind.ZSTD),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", LayerKind.ZSTD),
        (oci.OCI_LAYER, LayerKind.UNCOMPRESSED),
        ("application/vnd.docker.image.rootfs.diff.tar", LayerKind.UNCOMPRESSED),
        (oci.OCI_LAYER_GZIP + "+encrypted", LayerKind.ENCRYPTED),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", LayerKind.FOREIGN),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", LayerKind.FOREIGN),
        ("application/octet-stream", LayerKind.UNKNOWN),
        ("", LayerKind.UNKNOWN),
    ],
)
def test_layer_kinds(media_type: str, kind: LayerKind) -> None:
    assert oci.layer_kind(media_type) is kind


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("Linux/x86_64", Platform("linux", "amd64")),
        ("linux/amd64/v1", Platform("linux", "amd64")),
        ("linux/amd64/v3", Platform("linux", "amd64", "v3")),
        ("linux/aarch64", Platform("linux", "arm64")),
        ("linux/arm64/8", Platform("linux", "arm64")),
        ("linux/arm", Platform("linux", "arm", "v7")),
        ("linux/arm/6", Platform("linux", "arm", "v6")),
        ("linux/armhf", Platform("linux", "arm", "v7")),
        ("linux/armel", Platform("linux", "arm", "v6")),
        ("linux/i386", Platform("linux", "386")),
        ("macos/arm64", Platform("darwin", "arm64")),
    ],
)
def test_platforms(text: str, platform: Platform) -> None:
    assert Platform.parse(text) == platform
    assert Platform.parse(str(platform)) == platform


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "a/\n", "a/\u0430"])
def test_malformed_platforms(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Platform.parse(text)


# Cases of containerd/platforms compare_test.go (TestOnly).
@pytest.mark.parametrize(
    ("machine", "runs", "not_"),
    [
        ("linux/amd64", ["linux/amd64", "linux/386"], ["linux/amd64/v2", "linux/arm64"]),
        ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"],
         ["linux/amd64/v4"]),
        ("linux/386", ["linux/386"], ["linux/amd64"]),
        ("linux/arm/v7", ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"],
         ["linux/arm/v8", "linux/arm64", "linux/amd64"]),
        ("linux/arm/v6", ["linux/arm/v6", "linux/arm/v5"], ["linux/arm/v7"]),
        ("linux/arm64", ["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v5"],
         ["linux/amd64", "windows/arm64"]),
    ],
)  # fmt: skip
def test_what_runs_where(machine: str, runs: list[str], not_: list[str]) -> None:
    here = Platform.parse(machine)
    ranks = [here.rank(Platform.parse(text)) for text in runs]
    assert None not in ranks
    assert ranks == sorted(ranks, key=lambda rank: rank or 0)
    assert [here.rank(Platform.parse(text)) for text in not_] == [None] * len(not_)


def index(*entries: tuple[str, str | None, dict[str, Any]]) -> oci.Index:
    manifests = []
    for digit, platform, more in entries:
        entry: dict[str, Any] = {
            "mediaType": oci.OCI_MANIFEST, "digest": "sha256:" + digit * 64, "size": 1} | more  # fmt: skip
        if platform is not None:
            system, arch, *variant = platform.split("/")
            entry["platform"] = {"os": system, "architecture": arch, "os.features": ["x"]}
            entry["platform"] |= {"variant": variant[0]} if variant else {}
        manifests.append(entry)
    return oci.parse_index(dump({"schemaVersion": 2, "manifests": manifests}))


def test_choice_of_a_manifest() -> None:
    found = index(
        ("0", None, {}),
        ("1", "unknown/unknown", {}),
        ("2", "linux/386", {}),
        ("3", "linux/amd64", {"artifactType": "application/vnd.amazon.soci.index.v2+json"}),
        ("4", "linux/amd64", {"mediaType": "application/json"}),
        ("5", "linux/amd64", {}),
        ("6", "linux/amd64", {}),
        ("7", "linux/arm/v6", {}),
        ("8", "linux/arm/v7", {}),
        ("9", "linux/arm64/v8", {"artifactType": oci.OCI_CONFIG}),
    )
    for machine, digit in {
        "linux/amd64": "5", "linux/386": "2", "linux/arm/v7": "8", "linux/arm/v6": "7",
        "linux/arm64": "9", "linux/s390x": "0",
    }.items():  # fmt: skip
        assert found.choose(Platform.parse(machine)).digest == "sha256:" + digit * 64


def test_nothing_for_a_platform() -> None:
    with pytest.raises(RegistryNotFound, match="linux/amd64; it has linux/arm64") as caught:
        index(("1", "linux/arm64", {})).choose(Platform.parse("linux/amd64"))
    assert caught.value.reason == "no-platform"
    with pytest.raises(RegistryNotFound, match="nothing"):
        index().choose(Platform.parse("linux/amd64"))
