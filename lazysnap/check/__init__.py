# SPDX-License-Identifier: Apache-2.0
"""What `lazysnap check` looks at: small probes, each of which finds one kind of trouble.

A probe is a function that takes a `Context` and tells what it found; it stands in the module of its
theme, and in that module's `PROBES`. To add one: write it there. To add a theme: a module here and a
line in `everything`. `running` runs them, side by side and each with a limit of time.

Probes change nothing. What may be repaired comes as the `fix` of a finding, and is done by `repair`.
They work while the daemon, containerd or a registry is down, and never wait for a FUSE mount.
"""
