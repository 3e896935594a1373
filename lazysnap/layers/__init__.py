# SPDX-License-Identifier: Apache-2.0
"""Opening a layer (verified) and reading its files through the cache."""
