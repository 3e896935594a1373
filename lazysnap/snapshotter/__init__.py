# SPDX-License-Identifier: Apache-2.0
"""The snapshotter: what happens on disk, in the database and in the kernel for each call of containerd.

`snapshotter` has the operations. A request for the snapshot of a layer (`layer_request`) is answered with a
remote snapshot (`remote_snapshots`) or with one that the daemon fills (`direct_snapshots`, `unpack_ahead`).
`directories` has the layout below the root, `housekeeping` the work in the background.

Knows nothing of shards, layers, the cache, FUSE, registries and gRPC: `interfaces` says what it needs from
others, which `lazysnap.filesystem` implements.
"""

from lazysnap.snapshotter.snapshotter import Settings, Snapshotter

__all__ = ["Settings", "Snapshotter"]
