# SPDX-License-Identifier: Apache-2.0
"""lazysnap: a remote snapshotter for containerd that mounts layers instead of downloading them."""

import sys

__version__ = "0.2.0.dev0"

# httpx loads its command line where rich is installed, though nobody runs it: 45 ms and 5 MB in each
# of our processes. A None here makes that import fail in the way that httpx expects without rich.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # what importlib documents
