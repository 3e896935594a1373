# SPDX-License-Identifier: Apache-2.0
"""Whole images as directories, without a daemon and without containerd.

A command takes the root, does what it has to do with a snapshotter of its own, as containerd would with
the daemon's, and ends; shards live on for as long as something is mounted. What is mounted stands in the
snapshotter's database, so a command that is killed leaves what a daemon that is killed leaves: snapshots
that nobody needs, and directories that the database does not know. Each command begins by removing them.
"""
