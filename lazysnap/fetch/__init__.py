# SPDX-License-Identifier: Apache-2.0
"""Gets the bytes of files: from the cache, or from the registry through one scheduler, verified."""
