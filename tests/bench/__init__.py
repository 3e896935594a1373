# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: snapshotters side by side, on real images, each cold and in turn."""
