# SPDX-License-Identifier: Apache-2.0
"""Unpacks a layer into a directory, as containerd would: for layers that are not lazy.

In the order in which to read:

- `applier`: `apply`, and the rules that it keeps to.
- `stream`: the layer's tar, decompressed and hashed in a thread.
- `entries`: the tar's entries with all that its extensions say of them.
- `tree`: makes files and directories, entry by entry.
- `root`: directories below the target, which no path can leave.
- `attributes`: owner, xattrs, mode and times, in the right order.
- `aside`: brings what was unpacked early to its place.
- `process`, `applier_pool`: unpacking in a process of its own, and the daemon's end of it.
"""
