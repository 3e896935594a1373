# SPDX-License-Identifier: Apache-2.0
"""A layer's tree as an EROFS image without file data: what overlay's metadata-only lower layers are."""
