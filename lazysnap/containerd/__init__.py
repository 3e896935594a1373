# SPDX-License-Identifier: Apache-2.0
"""The calls to containerd that lazysnap makes."""
