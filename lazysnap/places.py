# SPDX-License-Identifier: Apache-2.0
"""Where things are by default."""

ROOT = "/var/lib/lazysnap"
"""All of the daemon's state."""
ADDRESS = "/run/lazysnap/lazysnap.sock"
"""Where the daemon serves containerd."""
CONTAINERD = "/run/containerd/containerd.sock"
"""Where containerd serves its clients."""
