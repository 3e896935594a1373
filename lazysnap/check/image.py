# SPDX-License-Identifier: Apache-2.0
"""Which layers of an image would be lazy, and why not the others; mounts and keeps nothing."""

from __future__ import annotations

import platform
import tempfile

import trio

from lazysnap import oci
from lazysnap.check.finding import Context, Finding, Probe, failure, info, warning
from lazysnap.check.state import environment
from lazysnap.credentials.docker_config import DockerConfig
from lazysnap.errors import DigestMismatch, FormatError, LazysnapError, NotLazy, RangesUnsupported
from lazysnap.formats.location import CONVERT_HINT
from lazysnap.layers.builder_pool import BuilderPool
from lazysnap.layers.layer_source import LayerSource
from lazysnap.layers.opener import Opener
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry

_BUILDERS = 2
_NOT_LAZY = (NotLazy, FormatError, DigestMismatch, RangesUnsupported)
"""Errors that say something of the layer or its registry for good."""


async def image(context: Context) -> list[Finding]:
    """Opens each layer as Prepare would, into a directory that is removed afterwards."""
    if context.image is None:
        return []
    wanted = Platform.parse(f"linux/{platform.machine()}")
    credentials = DockerConfig(environ=environment(context))
    async with Registry(context.registry, credentials) as registry:
        try:
            found = await registry.fetch_image(context.image, wanted)
        except LazysnapError as error:
            return [
                failure(
                    f"{context.image} cannot be read: {error}",
                    "it cannot be pulled from this node",
                    error.hint or "check its name, the network and the node's credentials",
                )
            ]
        with tempfile.TemporaryDirectory(prefix="lazysnap-check-") as directory:
            return await _layers(context, registry, context.image, found.manifest, directory)


async def _layers(
    context: Context,
    registry: Registry,
    reference: Reference,
    manifest: oci.Manifest,
    directory: str,
) -> list[Finding]:
    layers = manifest.layers or ()
    builders = BuilderPool(_BUILDERS)
    opener = Opener(directory, registry, builders, allow_unverified=context.allow_unverified)
    findings: dict[int, Finding] = {}

    async def one(number: int, layer: oci.Descriptor) -> None:
        name = f"layer {number + 1} of {len(layers)} {layer.digest} ({layer.size} bytes)"
        findings[number] = await _layer(opener, reference, layer, name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(builders.run)
        async with trio.open_nursery() as opening:
            for number, layer in enumerate(layers):
                opening.start_soon(one, number, layer)
        nursery.cancel_scope.cancel()
    result = [findings[number] for number in sorted(findings)]
    if not context.lazy:
        hint = "set lazy.enabled = true in lazysnap's configuration"
        result.append(warning("lazy mounting is switched off", "all layers are downloaded", hint))
    return result


async def _layer(opener: Opener, reference: Reference, layer: oci.Descriptor, name: str) -> Finding:
    try:
        await opener.open(LayerSource.of(layer, reference))
    except _NOT_LAZY as error:
        summary = f"{name} is downloaded and unpacked: {error.reason}"
        return warning(summary, str(error), error.hint or CONVERT_HINT)
    except LazysnapError as error:
        return failure(f"{name} cannot be read: {error}", hint=error.hint or "")
    return info(f"{name} is lazy")


PROBES = (Probe("image", "no image was named with --image", image, seconds=300),)
