# SPDX-License-Identifier: Apache-2.0
"""A client of containerd: content, images, leases, snapshots and diff in one namespace.

    async with Containerd("/run/containerd/containerd.sock", "default") as containerd:
        async with containerd.lease() as leased:
            await leased.content.write(...)

Everything that is created through `leased` is safe from garbage collection until the block ends;
what is then not reachable from an image is removed. Knows nothing of registries.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

import trio
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from lazysnap import paths
from lazysnap.containerd._pb import (
    diff_pb2,
    images_pb2,
    introspection_pb2,
    leases_pb2,
    namespaces_pb2,
    version_pb2,
)
from lazysnap.containerd._pb.types.descriptor_pb2 import Descriptor as _Descriptor
from lazysnap.containerd._pb.types.mount_pb2 import Mount
from lazysnap.containerd.connection import Connection
from lazysnap.containerd.content import Content
from lazysnap.containerd.snapshots import Snapshots
from lazysnap.errors import AlreadyExists, LazysnapError, NotFound

LEASE_LIFE = timedelta(hours=24)
"""After this a lease that was left behind is void. containerd has no call that renews one."""

_APPLY_SECONDS = 3600.0
_CLEANUP_SECONDS = 10.0


class Descriptor(Protocol):
    """What an OCI descriptor is to this module; size in bytes."""

    @property
    def media_type(self) -> str: ...  # noqa: D102 - named by the OCI specification
    @property
    def digest(self) -> str: ...  # noqa: D102 - likewise
    @property
    def size(self) -> int: ...  # noqa: D102 - likewise
    @property
    def annotations(self) -> Mapping[str, str] | None: ...  # noqa: D102 - likewise


@dataclass(frozen=True, slots=True)
class Image:
    """An image record: its name, and the descriptor of its index or manifest."""

    name: str
    media_type: str
    digest: str
    size: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that containerd knows.

    Attributes:
        type: such as `io.containerd.snapshotter.v1`.
        id: its name among those of its type.
        exports: what it tells of itself, from the configuration for a proxy plugin.
        capabilities: likewise.
        error: why it was not loaded; empty if it was.
    """

    type: str
    id: str
    exports: Mapping[str, str]
    capabilities: tuple[str, ...]
    error: str


class Containerd:
    """A connection to containerd, as an async context manager.

    Args:
        address: path of containerd's socket.
        namespace: containerd namespace of all calls.

    Raises:
        ContainerdError: on entry, when containerd cannot be reached.
    """

    def __init__(
        self,
        address: str = paths.CONTAINERD_ADDRESS,
        namespace: str = "default",
        *,
        connection: Connection | None = None,
    ) -> None:
        self._connection = connection or Connection(address, namespace)

    async def __aenter__(self) -> Self:
        await self._connection.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    @property
    def namespace(self) -> str:
        """The namespace of all calls."""
        return self._connection.namespace

    @property
    def address(self) -> str:
        """Path of containerd's socket."""
        return self._connection.address

    @property
    def content(self) -> Content:
        """The content store."""
        return Content(self._connection)

    def snapshots(self, snapshotter: str) -> Snapshots:
        """The snapshots of one snapshotter."""
        return Snapshots(self._connection, snapshotter)

    async def version(self) -> str:
        """containerd's version."""
        answer = await self._connection.unary(
            "containerd.services.version.v1.Version/Version",
            Empty(),
            version_pb2.VersionResponse,
            what="version",
        )
        return answer.version

    async def plugins(self) -> list[Plugin]:
        """All plugins, loaded or not."""
        answer = await self._connection.unary(
            "containerd.services.introspection.v1.Introspection/Plugins",
            introspection_pb2.PluginsRequest(),
            introspection_pb2.PluginsResponse,
            what="list of plugins",
        )
        return [
            Plugin(p.type, p.id, dict(p.exports), tuple(p.capabilities), p.init_err.message)
            for p in answer.plugins
        ]

    async def namespaces(self) -> list[str]:
        """All namespaces."""
        answer = await self._connection.unary(
            "containerd.services.namespaces.v1.Namespaces/List",
            namespaces_pb2.ListNamespacesRequest(),
            namespaces_pb2.ListNamespacesResponse,
            what="list of namespaces",
        )
        return [namespace.name for namespace in answer.namespaces]

    async def apply(self, layer: Descriptor, mounts: Sequence[Mount]) -> str:
        """Unpack a layer of the content store into a snapshot.

        Args:
            layer: descriptor of the compressed layer.
            mounts: what Prepare returned.

        Returns:
            The digest of the uncompressed tar, as containerd saw it.
        """
        answer = await self._connection.unary(
            "containerd.services.diff.v1.Diff/Apply",
            diff_pb2.ApplyRequest(diff=_descriptor(layer), mounts=mounts),
            diff_pb2.ApplyResponse,
            what=f"unpack layer {layer.digest}",
            timeout=_APPLY_SECONDS,
        )
        return answer.applied.digest

    async def images(self, *filters: str) -> list[Image]:
        """All images of the namespace that match one of the filters (containerd's syntax)."""
        answer = await self._connection.unary(
            f"{_IMAGES}/List",
            images_pb2.ListImagesRequest(filters=filters),
            images_pb2.ListImagesResponse,
            what="list of images",
        )
        return [_image(image) for image in answer.images]

    async def image(self, name: str) -> Image:
        """One image.

        Raises:
            NotFound: there is none of this name.
        """
        answer = await self._connection.unary(
            f"{_IMAGES}/Get",
            images_pb2.GetImageRequest(name=name),
            images_pb2.GetImageResponse,
            what=f"image {name}",
        )
        return _image(answer.image)

    async def set_image(self, name: str, target: Descriptor) -> None:
        """Make an image, or point the one of this name to another target; its labels stay."""
        image = images_pb2.Image(name=name, target=_descriptor(target))
        for last in (False, False, True):  # another client may create or delete it in between
            try:
                await self._connection.unary(
                    f"{_IMAGES}/Create",
                    images_pb2.CreateImageRequest(image=image),
                    images_pb2.CreateImageResponse,
                    what=f"create image {name}",
                )
            except AlreadyExists:
                try:
                    await self._connection.unary(
                        f"{_IMAGES}/Update",
                        images_pb2.UpdateImageRequest(
                            image=image, update_mask=FieldMask(paths=["target"])
                        ),
                        images_pb2.UpdateImageResponse,
                        what=f"update image {name}",
                    )
                except NotFound:
                    if last:
                        raise
                    continue
            return

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Containerd]:
        """A lease for as long as the block lasts, deleted in any case.

        When the block fails, garbage collection is run, so that what it has made is gone at once.

        Yields:
            A client whose creations join the lease.
        """
        expires = datetime.now(UTC) + LEASE_LIFE
        suffix = base64.urlsafe_b64encode(os.urandom(3)).decode()
        name = f"lazysnap-{time.time_ns()}-{suffix}"
        request = leases_pb2.CreateRequest(
            id=name,
            labels={"containerd.io/gc.expire": expires.strftime("%Y-%m-%dT%H:%M:%SZ")},
        )
        done = False
        try:
            await self._connection.unary(
                f"{_LEASES}/Create", request, leases_pb2.CreateResponse, what="create a lease"
            )
            yield Containerd(connection=self._connection.with_lease(name))
            done = True
        finally:
            # Also when the creation was cancelled: containerd may have got that far. A lease that
            # cannot be deleted expires, so this failure must not hide what happened before.
            with (
                trio.move_on_after(_CLEANUP_SECONDS, shield=True),
                contextlib.suppress(LazysnapError),
            ):
                await self._connection.unary(
                    f"{_LEASES}/Delete",
                    leases_pb2.DeleteRequest(id=name, sync=not done),
                    Empty,
                    what="delete a lease",
                )

    async def leases(self) -> list[str]:
        """The ids of all leases of the namespace."""
        answer = await self._connection.unary(
            f"{_LEASES}/List",
            leases_pb2.ListRequest(),
            leases_pb2.ListResponse,
            what="list of leases",
        )
        return [lease.id for lease in answer.leases]


_IMAGES = "containerd.services.images.v1.Images"
_LEASES = "containerd.services.leases.v1.Leases"


def _descriptor(descriptor: Descriptor) -> _Descriptor:
    return _Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.annotations or {},
    )


def _image(image: images_pb2.Image) -> Image:
    target = image.target
    return Image(image.name, target.media_type, target.digest, target.size, dict(image.labels))
