# SPDX-License-Identifier: Apache-2.0
"""Chooses what is fetched before anybody reads it: from profiles, and from what is read."""
