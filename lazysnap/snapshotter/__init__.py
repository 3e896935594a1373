# SPDX-License-Identifier: Apache-2.0
"""Decides what happens on disk, in the database and in the kernel for each call of containerd."""

from lazysnap.snapshotter.snapshotter import Settings, Snapshotter

__all__ = ["Settings", "Snapshotter"]
