# SPDX-License-Identifier: Apache-2.0
"""Small OCI images for tests, built here byte for byte the same each time, without the network.

`busybox_layers()` gives the root filesystem of Debian's busybox-static in three layers (programs;
data; changes with a whiteout), enough for `ctr run` of a shell. `write_layout` makes an OCI image
layout of any layers, and `push` copies a layout to a registry with skopeo. Test data with other
properties (eStargz, zstd:chunked) is made by passing other `Layer`s. Knows no code of lazysnap, so
that what tests compare with is not made by what they test.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"

_APPLETS = (
    *("sh", "ls", "cat", "echo", "find", "md5sum", "sha256sum", "stat", "sleep", "id", "mkdir"),
    *("touch", "rm", "mv", "cp", "dd", "head", "tail", "wc", "grep", "ln", "test", "true", "false"),
)


def digest_of(data: bytes) -> str:
    """The sha256 digest in its textual form."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Layer:
    """One layer blob and what a manifest and a config say of it."""

    blob: bytes
    diff_id: str
    media_type: str = LAYER_GZIP
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_of(self.blob)

    def descriptor(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": len(self.blob),
        }
        if self.annotations:
            result["annotations"] = dict(self.annotations)
        return result


@dataclass(frozen=True)
class Layout:
    """An OCI image layout on disk."""

    path: Path
    target: str  # digest of the index if there is one, else of the manifest
    manifest: str
    config: str
    layers: tuple[Layer, ...]
    tag: str = "latest"

    @property
    def chain_ids(self) -> list[str]:
        """The chain id of each layer, bottom up (OCI image specification, config.md)."""
        chain: list[str] = []
        for layer in self.layers:
            below = f"{chain[-1]} {layer.diff_id}" if chain else ""
            chain.append(digest_of(below.encode()) if below else layer.diff_id)
        return chain


def tar(entries: Iterable[tuple[str, bytes | str | None]]) -> bytes:
    """A tar of (path, content): bytes is a file, str a symlink's target, None a directory.

    Files in a directory called `bin` are executable. Owners are root, times are 2020-01-01.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in entries:
            info = tarfile.TarInfo(path)
            info.mtime = 1577836800
            info.mode = 0o755 if content is None or "bin/" in path else 0o644
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, content, 0o777
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def gzip_layer(tar_bytes: bytes, annotations: Mapping[str, str] | None = None) -> Layer:
    """A plain tar+gzip layer (never lazy) of these tar bytes."""
    blob = gzip.compress(tar_bytes, compresslevel=1, mtime=0)
    return Layer(blob, digest_of(tar_bytes), LAYER_GZIP, annotations or {})


def busybox_tars(payload: bytes = b"") -> list[bytes]:
    """The three tars of the busybox image, bottom first.

    Args:
        payload: content of `/data/payload` in the middle layer, to make the image big or unique.
    """
    busybox = Path("/bin/busybox").read_bytes()
    base: list[tuple[str, bytes | str | None]] = [
        *((name, None) for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root")),
        ("bin/busybox", busybox),
        *((f"bin/{name}", "busybox") for name in _APPLETS),
        ("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", b"root:x:0:\n"),
    ]
    data: list[tuple[str, bytes | str | None]] = [
        ("data", None),
        ("data/hello", b"hello from the middle layer\n"),
        ("data/gone", b"the top layer removes this\n"),
        ("data/payload", payload),
        ("data/many", None),
        *((f"data/many/{n:03d}", f"file {n}\n".encode() * n) for n in range(50)),
    ]
    top: list[tuple[str, bytes | str | None]] = [
        ("data", None),
        ("data/.wh.gone", b""),
        ("data/hello", b"hello from the top layer\n"),
        ("etc", None),
        ("etc/motd", b"lazysnap test image\n"),
    ]
    return [tar(base), tar(data), tar(top)]


def busybox_layers(payload: bytes = b"") -> list[Layer]:
    """The busybox image as three plain gzip layers."""
    return [gzip_layer(data) for data in busybox_tars(payload)]


def write_layout(
    path: Path,
    layers: Sequence[Layer],
    *,
    tag: str = "latest",
    index: bool = False,
    env: Sequence[str] = (),
) -> Layout:
    """Write an OCI image layout.

    Args:
        path: the directory, created.
        layers: bottom first.
        tag: the `org.opencontainers.image.ref.name` in index.json.
        index: whether an image index for amd64 (and an absent arm64) stands before the manifest.
        env: environment in the config besides PATH.
    """
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        digest = digest_of(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    for layer in layers:
        put(layer.blob, layer.media_type)
    config = put(_json(_config(layers, env)), CONFIG)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": [layer.descriptor() for layer in layers],
    }
    manifest = target = put(_json(document), MANIFEST)
    if index:
        amd64 = {**manifest, "platform": {"os": "linux", "architecture": "amd64"}}
        target = put(
            _json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [amd64]}),
            INDEX,
        )
    entry = {**target, "annotations": {"org.opencontainers.image.ref.name": tag}}
    (path / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": [entry]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return Layout(path, target["digest"], manifest["digest"], config["digest"], tuple(layers), tag)


def push(layout: Layout, registry: str, repository: str, tag: str = "latest") -> str:
    """Copy a layout to a plain-http registry with skopeo, byte for byte.

    Args:
        registry: `host:port`.

    Returns:
        The reference to pull, `host:port/repository:tag`.
    """
    reference = f"{registry}/{repository}:{tag}"
    command = [
        *("skopeo", "copy", "--quiet", "--insecure-policy", "--all", "--preserve-digests"),
        *("--dest-tls-verify=false", "--dest-no-creds"),
        *(f"oci:{layout.path}:{layout.tag}", f"docker://{reference}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"skopeo: {done.stderr}")
    return reference


def _config(layers: Sequence[Layer], env: Sequence[str]) -> dict[str, Any]:
    return {
        "created": "2020-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin", *env], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": "2020-01-01T00:00:00Z", "created_by": "test"} for _ in layers],
    }


def _json(document: object) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()
