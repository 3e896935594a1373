# SPDX-License-Identifier: Apache-2.0
"""Formats of layers, gzip and zstd members, tables of contents: bytes to objects, without I/O."""
