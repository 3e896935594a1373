# SPDX-License-Identifier: Apache-2.0
"""Mounts remote layers: what `lazysnap.snapshotter.interfaces` asks for, done with shards."""
