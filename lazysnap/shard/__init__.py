# SPDX-License-Identifier: Apache-2.0
"""A shard: one FUSE mount that serves many layers; the keeper and worker processes."""
