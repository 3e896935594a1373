# SPDX-License-Identifier: Apache-2.0
"""What lazysnap remembers about snapshots, in SQLite."""
