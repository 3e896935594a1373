# SPDX-License-Identifier: Apache-2.0
"""Mounts and unmounts whole images.

A mount is in the database before the kernel has it, and it is one call of the kernel that makes it. So
what a command leaves that is killed is either a mount with its record, or no mount; a record without a
mount is garbage, whatever the reason. Invariant: what `settle` leaves is what the database says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from lazysnap import log, mounts
from lazysnap.errors import AlreadyExists, FailedPrecondition, Internal, InvalidArgument
from lazysnap.paths import Root
from lazysnap.platforms import Platform
from lazysnap.reference import Reference
from lazysnap.registry.client import Registry
from lazysnap.registry.image import Image
from lazysnap.standalone import combining, engine
from lazysnap.standalone import root as roots
from lazysnap.standalone.engine import Engine
from lazysnap.standalone.image import LayerResult, bring, composition
from lazysnap.standalone.processes import namespace, namespace_is_in_use
from lazysnap.standalone.records import Record, forget_unused, new_source, records
from lazysnap.standalone.teardown import take_down
from lazysnap.store.snapshots import SnapshotStore

_log = log.get(__name__)
_BUSY_SECONDS = 2.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Request:
    """What is to be mounted.

    Attributes:
        reference: of the image.
        mountpoint: an empty directory.
        platform: which of the image's.
        writable: what is written goes to a directory that is removed with the mount.
        plain_http: speak HTTP without TLS to the registry.
    """

    reference: Reference
    mountpoint: str
    platform: Platform
    writable: bool = False
    plain_http: bool = False


@dataclass(frozen=True)
class Mounted:
    """What was mounted.

    Attributes:
        record: of the mount.
        layers: what became of each, lowest first.
    """

    record: Record
    layers: list[LayerResult]


async def mount(
    root: str, request: Request, progress: Callable[[int, LayerResult], None]
) -> Mounted:
    """Mount an image. If this fails or is cancelled, nothing is left but what is in the cache.

    Args:
        root: absolute, without symbolic links.
        request: what.
        progress: called with each layer's number, from 0, and what became of it.

    Raises:
        FailedPrecondition, InvalidArgument, AlreadyExists: it cannot be mounted there.
        LazysnapError: the image cannot be had, or the kernel refused.
    """
    roots.check_mounting()
    roots.check_fuse()
    combining.check()
    _check_mountpoint(root, request.mountpoint)
    hosts = frozenset({request.reference.host} if request.plain_http else ())
    settings = engine.registry_settings(hosts)
    async with Registry(settings) as registry:
        image = await registry.fetch_image(request.reference, request.platform)
        async with roots.taken(root):
            store = engine.open_store(root)
            try:
                if not _forget(root, store):
                    # Shards that are left may be in a mount namespace that nobody else is in.
                    await take_down(root, engine.new_supervisor(root))
                source = new_source()
                try:
                    return await engine.run(
                        root,
                        store,
                        registry,
                        settings,
                        partial(
                            _mount, root, request, image=image, source=source, progress=progress
                        ),
                        find_profiles=not request.reference.is_local,
                    )
                except BaseException:
                    with trio.CancelScope(shield=True):
                        _drop(request.mountpoint, source)
                        await _settle(root, store, registry)
                    raise
            finally:
                store.close()


async def _mount(
    root: str,
    request: Request,
    parts: Engine,
    *,
    image: Image,
    source: str,
    progress: Callable[[int, LayerResult], None],
) -> Mounted:
    if request.writable and not image.manifest.layers:
        raise FailedPrecondition(f"{request.reference} has no layers, and cannot be writable")
    top, layers = await bring(parts, image, progress)
    record = Record(
        request.mountpoint,
        request.reference.name,
        image.descriptor.digest,
        source,
        namespace(),
    )
    make = parts.snapshotter.prepare if request.writable else parts.snapshotter.view
    shown = composition(await make(record.key, top, record.labels()))
    os.makedirs(Root(root).empty, mode=0o755, exist_ok=True)
    _check_mountpoint(root, request.mountpoint)
    await trio.to_thread.run_sync(combining.show, root, shown, source, request.mountpoint)
    return Mounted(record, layers)


async def unmount(root: str, mountpoint: str, *, lazy: bool) -> bool:
    """Unmount an image, and remove whatever is there for it or for commands that were killed.

    Args:
        root: absolute, without symbolic links.
        mountpoint: where it is.
        lazy: also while it is in use; who uses it sees errors then.

    Returns:
        Whether it was mounted.

    Raises:
        FailedPrecondition: something else is mounted there, or it is in use.
        LazysnapError: something cannot be removed.
    """
    roots.check_mounting()
    there = mounts.mounted_at(mountpoint)
    if not roots.exists(root):
        if there is not None:
            raise _foreign(mountpoint)
        return False
    async with roots.taken(root), Registry(engine.registry_settings()) as registry:
        store = engine.open_store(root)
        try:
            there = mounts.mounted_at(mountpoint)
            ours = {record.source for record in records(store)}
            if there is not None:
                if there.source not in ours:
                    raise _foreign(mountpoint)
                await _unmount(mountpoint, lazy)
            with trio.CancelScope(shield=True):
                _forget(root, store)
                await _settle(root, store, registry)
        finally:
            store.close()
    return there is not None


async def _unmount(mountpoint: str, lazy: bool) -> None:
    deadline = trio.current_time() + _BUSY_SECONDS
    while True:
        try:
            await trio.to_thread.run_sync(partial(mounts.unmount, mountpoint, lazy=lazy))
            return
        except Internal as error:
            # Who has only looked at it is gone in a moment.
            if trio.current_time() > deadline:
                raise FailedPrecondition(
                    error.message,
                    hint="end the processes that use it (`fuser -m` lists them), or use --lazy",
                ) from error
        await trio.sleep(_POLL_SECONDS)


def _foreign(mountpoint: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the mount at {mountpoint} was not made by lazysnap with this root",
        hint="if it was mounted with another --root, give the same here",
    )


def _forget(root: str, store: SnapshotStore) -> bool:
    """Forget mounts that are no more; whether there are any others."""
    points = mounts.mount_points()
    visible = {point.source for point in points}
    ours = namespace()
    for record in records(store):
        if (
            record.source not in visible
            and record.namespace != ours
            and namespace_is_in_use(record.namespace, root)
        ):
            raise FailedPrecondition(
                f"{record.mountpoint} is mounted from this root in another mount namespace",
                hint="unmount it there, or give another directory with --root",
            )
    return bool(forget_unused(store, points))


def _drop(mountpoint: str, source: str) -> None:
    """Unmount what a command that failed has mounted, if it came so far."""
    there = mounts.mounted_at(mountpoint)
    if there is not None and there.source == source:
        mounts.unmount(mountpoint)


async def _settle(root: str, store: SnapshotStore, registry: Registry) -> None:
    """Bring a root to what its mounts need, and end everything if there are none."""

    async def nothing(_parts: Engine) -> None:
        pass

    if forget_unused(store, mounts.mount_points()):
        settings = engine.registry_settings()
        await engine.run(root, store, registry, settings, nothing, find_profiles=False)
    else:
        await take_down(root, engine.new_supervisor(root))


def _check_mountpoint(root: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"the name of {path!r} is not UTF-8") from error
    there = mounts.mounted_at(path)
    if there is not None:
        raise AlreadyExists(
            f"something is mounted at {path} already: {there.fstype} {there.source}",
            hint="unmount it first (lazysnap umount, if lazysnap mounted it)",
        )
    if os.path.commonpath((path, root)) == root or path == "/":
        raise InvalidArgument(f"{path} cannot be the mount point: choose one outside of {root}")
    try:
        names = os.listdir(path)
    except OSError as error:
        raise InvalidArgument(
            f"{path} cannot be the mount point: {error.strerror}", hint="give an empty directory"
        ) from error
    if names:
        raise FailedPrecondition(
            f"{path} is not empty", hint="give an empty directory as the mount point"
        )
