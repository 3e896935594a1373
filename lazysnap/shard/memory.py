# SPDX-License-Identifier: Apache-2.0
"""Has the C library keep freed memory for a while instead of returning it to the kernel at once.

Fetching takes and frees megabytes for each member. By default glibc unmaps them, and the kernel has to
find and clear every page again: in a virtual machine that takes longer than all decoding. See
mallopt(3) and malloc_trim(3). Without glibc, nothing happens.

Invariant: no more than `_KEPT` bytes of free memory stay on top of the heap.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT = 64 << 20
_MAPPED = 32 << 20  # glibc accepts no more

_libc = ctypes.CDLL(None)


def keep_freed() -> None:
    """Keep freed memory for reuse by any thread; call it once, before threads allocate."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        # What one decoding thread has freed is of use to the next only in a common arena.
        _libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return free memory to the kernel; takes some milliseconds."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
