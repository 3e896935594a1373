# SPDX-License-Identifier: Apache-2.0
"""The scripted registry, which is a server that misbehaves in every way we have heard of."""

from tests.registry.conftest import image, registry, server

__all__ = ["image", "registry", "server"]
