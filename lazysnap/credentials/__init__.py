# SPDX-License-Identifier: Apache-2.0
"""Logins for registries, from every place where they are kept."""
