# SPDX-License-Identifier: Apache-2.0
"""All probes, in the order in which their findings are shown: from the machine up to images."""

from __future__ import annotations

from lazysnap.check import (
    cache,
    containerd,
    daemon,
    disk,
    image,
    kernel,
    mount_points,
    overlay,
    podman,
    registry,
    shards,
    store,
)
from lazysnap.check.finding import Probe

PROBES: tuple[Probe, ...] = (
    *kernel.PROBES,
    *overlay.PROBES,
    *disk.PROBES,
    *cache.PROBES,
    *mount_points.PROBES,  # what is mounted in a directory that is to go is unmounted first
    *store.PROBES,
    *shards.PROBES,
    *daemon.PROBES,
    *containerd.PROBES,
    *podman.PROBES,
    *registry.PROBES,
    *image.PROBES,
)
