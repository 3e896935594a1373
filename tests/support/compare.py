# SPDX-License-Identifier: Apache-2.0
"""Mounts what a container of an image would see, under any snapshotter, to dump and compare it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path

from fixtures.containerd import Containerd
from fixtures.processes import run
from fixtures.registry import Registry

from .views import make_view


def chain_id(server: Registry, repository: str, form: str) -> str:
    """The chain id of an image's top layer (OCI image-spec, config.md, Layer ChainID)."""
    manifest = server.manifest(repository, form)
    config = json.loads(server.blob(repository, manifest["config"]["digest"]))
    below, *above = config["rootfs"]["diff_ids"]
    for diff_id in above:
        below = f"sha256:{hashlib.sha256(f'{below} {diff_id}'.encode()).hexdigest()}"
    return str(below)


@contextlib.contextmanager
def root_file_system(
    client: Containerd, snapshotter: str, chain: str, target: Path, *, writable: bool = True
) -> Iterator[Path]:
    """Mount a fresh snapshot of an image that was pulled.

    Args:
        client: Has the image.
        snapshotter: Where it was pulled to.
        chain: Its chain id.
        target: Directory for the mountpoint; made if missing.
        writable: Prepare, as for a container; else View.

    Yields:
        The mountpoint.
    """
    target.mkdir(parents=True, exist_ok=True)
    key = f"compare-{uuid.uuid4().hex[:12]}"
    snapshots = ("snapshots", "--snapshotter", snapshotter)
    if writable:
        client.ctr(*snapshots, "prepare", key, chain)
    else:
        make_view(client.address, snapshotter, key, chain)
    try:
        for line in client.ctr(*snapshots, "mounts", str(target), key).splitlines():
            run(shlex.split(line))
        try:
            yield target
        finally:
            run(["umount", target])
    finally:
        client.ctr(*snapshots, "rm", key)
