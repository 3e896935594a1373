# SPDX-License-Identifier: Apache-2.0
"""The index of a layer: its tree and chunks in flat arrays that are mapped, not loaded."""
