# SPDX-License-Identifier: Apache-2.0
"""Pulling an image into containerd so that its layers can be mounted instead of downloaded."""
