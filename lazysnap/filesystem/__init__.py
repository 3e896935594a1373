# SPDX-License-Identifier: Apache-2.0
"""The file system of lazy layers: implements `lazysnap.snapshotter.interfaces` with shards.

`shard_filesystem` mounts, checks and unmounts layers. `layer_mounts` and `kernel_tree_mounts` make them
visible, and `deferred_mounts` has that done later. `layer_unpacker` unpacks layers that are not lazy.
`open_ahead`, `fetch_ahead`, `profile_finder` and `profile_learner` only save time; nothing depends on them.
`assembly` puts all of it together.
"""
