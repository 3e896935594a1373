# SPDX-License-Identifier: Apache-2.0
"""Many small files, and one of 1 GiB: read in sequence, by several readers, at random places."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fixtures.images import big
from fixtures.images.catalogue import Built
from fixtures.sides import drop_page_cache

from .origin import NETWORKS
from .plan import Measure, Values
from .reading import read, seconds, thrice
from .scene import Scene

_SECONDS_OF_RATE = 10
_PAGES = 3000


def _small(scene: Scene, image: Built) -> Values:
    scene.pull(image)
    with scene.mounted(image) as root:
        values = thrice(scene, lambda: seconds("shuffled", root / big.SMALL))
    return {**values, "sent twice [B]": scene.sent().duplicate_bytes}


def _sequential(scene: Scene, image: Built) -> Values:
    """The whole file, three times; through a limited network, as much as takes ten seconds."""
    limit = int(scene.network.rate * _SECONDS_OF_RATE)
    # Before the snapshotter has anything to fetch in the background.
    curl = _curl(scene, image, limit or big.BLOB_SIZE)
    scene.pull(image)
    before = scene.disk()
    with scene.mounted(image) as root:
        blob = root / big.BLOB
        if not limit:
            values = thrice(scene, lambda: seconds("sequential", blob, 0))
            values["first [MB/s]"] = big.BLOB_SIZE / 1e6 / values["first [s]"]
            values["disk: snapshotter [MB]"] = scene.disk()
            values["disk: content store [MB]"] = scene.content()
        else:
            values = {"first [MB/s]": limit / 1e6 / seconds("sequential", blob, limit)}
            values["disk: more than before [MB]"] = scene.disk() - before
    values["sent twice [B]"] = scene.sent().duplicate_bytes
    values["curl of the blob [MB/s]"] = curl / 1e6
    return values


def _curl(scene: Scene, image: Built, size: int) -> float:
    """Bytes per second that the network gives to one who only wants the bytes."""
    scene.origin.reference(image, scene.side.form, scene.network)
    manifest = scene.origin.server.manifest(image.repository, scene.side.form)
    digest = max(manifest["layers"], key=lambda layer: int(layer["size"]))["digest"]
    return size / scene.origin.curl(image, scene.network, {digest: size})


def _parts(scene: Scene, image: Built) -> Values:
    scene.pull(image)
    with scene.mounted(image) as root:
        values = thrice(scene, lambda: seconds("parts", root / big.BLOB, 4))
    return {**values, "sent twice [B]": scene.sent().duplicate_bytes}


def _random(scene: Scene, image: Built) -> Values:
    scene.pull(image)
    with scene.mounted(image) as root:
        blob = root / big.BLOB
        seconds("sequential", blob, 0)
        scene.settle()
        drop_page_cache()
        values = _latencies(blob, "page cache dropped")
        seconds("sequential", blob, 0)
        return {**values, **_latencies(blob, "in page cache")}


def _latencies(blob: Path, state: str) -> Values:
    found = read("pages", blob, _PAGES)
    return {f"{state}: {name} [us]": found[name] * 1e6 for name in ("p50", "p99")}


_IMAGE = partial(big.build, ("plain", "esgz"))
MEASURES = [
    Measure("small", "big: 2,000 small files, random order", _IMAGE, _small),
    Measure("sequential", "big: 1 GiB in sequence", _IMAGE, _sequential),
    Measure(
        "limited", "big: 1 GiB in sequence, limited", _IMAGE, _sequential,
        tuple(one.name for one in NETWORKS.values() if one.rate), lazy_only=True,
    ),
    Measure("parts", "big: 1 GiB by 4 readers", _IMAGE, _parts),
    Measure("random", "big: 4 KiB at random places, all local", _IMAGE, _random),
]  # fmt: skip
