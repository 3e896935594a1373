# SPDX-License-Identifier: Apache-2.0
"""Layers that cannot be lazy, unpacked by the daemon itself (`eager = "direct"`).

The layer goes from the registry straight into a committed snapshot, and Prepare answers that it exists,
as for a lazy one: so containerd neither downloads nor keeps the blob. What was unpacked is checked
against the blob's digest, and against the chain id that the client asks for, which is made of the
parent's and of the layer's diff id (OCI image-spec, config.md). Whatever goes wrong leads to an ordinary
snapshot, which the client fills: it is never an error of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import trio

from lazysnap import log, mounts, oci
from lazysnap.digest import Digest
from lazysnap.errors import AlreadyExists, DigestMismatch, LazysnapError, NotFound
from lazysnap.labels import REASON, SNAPSHOT_REF
from lazysnap.overlay import Kind
from lazysnap.snapshotter import directory_tree
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.interfaces import LayerBlob, Unpacker
from lazysnap.snapshotter.locks import DatabaseThread, KeyLocks
from lazysnap.snapshotter.unpack_ahead import Image, UnpackAhead
from lazysnap.store.records import Lineage
from lazysnap.store.snapshots import SnapshotStore

_log = log.get(__name__)
_REGISTRY_FAILS = frozenset(
    {"registry-error", "registry-unreachable", "not-in-registry", "unauthorized"}
)
"""Why a layer is not lazy, when asking the registry again would only take time."""


class DirectSnapshots:
    """The snapshots of one root that the daemon fills itself.

    Args:
        directories: of the root.
        store: its database.
        db_thread: runs what uses the database.
        housekeeping: collects directories that come to nothing.
        unpacker: downloads and unpacks layers.
        sync: wait until the disk has a layer before its snapshot is made.
    """

    def __init__(
        self,
        directories: Directories,
        store: SnapshotStore,
        db_thread: DatabaseThread,
        housekeeping: Housekeeping,
        unpacker: Unpacker,
        *,
        sync: bool,
    ) -> None:
        self._dirs = directories
        self._store = store
        self._db_thread = db_thread
        self._housekeeping = housekeeping
        self._unpacker = unpacker
        self._sync = sync
        self._names = KeyLocks()
        self._ahead = UnpackAhead(directories, housekeeping, unpacker)

    def start(self, nursery: trio.Nursery) -> None:
        """Unpack layers also before they are asked for, from now on.

        Args:
            nursery: where that is done.
        """
        self._ahead.start(nursery)

    def client(self, labels: Mapping[str, str]) -> AbstractContextManager[Image]:
        """A client asks for a layer and waits in the body, in whatever way that is got.

        Args:
            labels: of its request.
        """
        return self._ahead.client(labels)

    async def prepare(
        self,
        parent: str,
        below: Lineage | None,
        labels: Mapping[str, str],
        reason: str,
        image: Image,
    ) -> None:
        """Try to make a committed snapshot of a layer; returns if it is not possible.

        Args:
            parent: name of the snapshot below, or empty.
            below: the same, as it is in the database.
            labels: of the request.
            reason: why the layer is not lazy.
            image: from `client`.

        Raises:
            AlreadyExists: it is there now.
            NotFound: the parent was removed meanwhile.
            Internal: the database failed.
        """
        ref = labels[SNAPSHOT_REF]
        name = f"{ref}@{0 if below is None else below.snapshot.id}"
        chain = "" if below is None else below.snapshot.labels.get(SNAPSHOT_REF)
        if chain is None or reason in _REGISTRY_FAILS:
            return
        async with self._names.hold(name):
            try:
                found = await self._db_thread.run(self._store.lineage, name)
            except NotFound:
                labels = {**labels, REASON: reason}
                await self._make(name, parent, below, labels, chain, image)
                return
            snapshot = found.snapshot
            if (
                snapshot.kind is Kind.COMMITTED
                and snapshot.parent == parent
                and snapshot.labels.get(SNAPSHOT_REF) == ref
                and snapshot.id not in found.attachments
            ):
                raise AlreadyExists(f"snapshot {name!r} exists")

    async def _make(
        self,
        name: str,
        parent: str,
        below: Lineage | None,
        labels: Mapping[str, str],
        chain: str,
        image: Image,
    ) -> None:
        self._ahead.begin(image, labels)
        numbers = () if below is None else (below.snapshot.id, *below.ancestors)
        parent_id = numbers[0] if numbers else None
        with self._housekeeping.building() as directory:

            def build() -> str:
                return self._dirs.build(directory, work=False, parent_id=parent_id)

            try:
                layer = await self._unpacker.find(labels)
                target = await trio.to_thread.run_sync(build)
                lowers = [self._dirs.fs(number) for number in numbers]
                answer = await self._ahead.take(image, layer, target, lowers)
                ahead = answer is not None
                if answer is None:
                    answer = await self._unpacker.unpack(layer, target, lowers)
                _check_chain(layer, chain, answer.diff_id, labels[SNAPSHOT_REF])
                if self._sync:
                    await trio.to_thread.run_sync(mounts.sync_filesystem, target)
                usage = await trio.to_thread.run_sync(directory_tree.measure, target)
            except LazysnapError as error:
                self._housekeeping.expect_garbage()
                _log.warning("a layer is left to containerd", name=name, error=error)
                return
            except Exception:
                self._housekeeping.expect_garbage()
                _log.exception("unpacking a layer failed")
                return

            def place() -> None:
                with self._store.committing(
                    name, parent, labels, usage, parent_id=parent_id
                ) as number:
                    self._dirs.place(directory, number)

            await self._db_thread.run(place)
        if answer.ignored_xattrs:
            _log.warning(
                "xattrs of a layer were left out", layer=layer.digest, xattrs=answer.examples
            )
        _log.info(
            "a layer is unpacked",
            name=name,
            entries=answer.entries,
            bytes=answer.size,
            ahead=ahead,
        )
        raise AlreadyExists(f"snapshot {name!r} is ready")


def _check_chain(layer: LayerBlob, chain: str, diff_id: str, wanted: str) -> None:
    found = oci.chain_id(Digest.parse(chain) if chain else None, Digest.parse(diff_id))
    if found != wanted:
        raise DigestMismatch(
            f"layer {layer.digest} unpacks to {diff_id}, which makes {found} and not {wanted}"
        )
