# SPDX-License-Identifier: Apache-2.0
"""Unpacks a layer into a directory: `apply` in `applier`, in a process of its own in `processes`."""
