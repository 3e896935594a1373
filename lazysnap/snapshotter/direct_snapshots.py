# SPDX-License-Identifier: Apache-2.0
"""The snapshots of layers that cannot be lazy, which the daemon fills itself (`eager = "direct"`).

The layer goes from the registry straight into a committed snapshot, and Prepare answers that the snapshot
exists, as for a remote one. So containerd neither downloads nor keeps the blob. What was unpacked is
checked against the blob's digest, and against the chain id that the client asks for, which is made of the
parent's chain id and the layer's diff id (OCI image-spec, config.md). Whatever goes wrong leads to an
ordinary snapshot, which the client fills: it is never an error of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import trio

from lazysnap import log, mounts, oci
from lazysnap.digest import Digest
from lazysnap.errors import DigestMismatch, LazysnapError
from lazysnap.labels import REASON, SNAPSHOT_REF
from lazysnap.snapshotter import directory_tree
from lazysnap.snapshotter.directories import Directories
from lazysnap.snapshotter.housekeeping import Housekeeping
from lazysnap.snapshotter.interfaces import LayerBlob, Unpacker
from lazysnap.snapshotter.layer_request import NAME_TAKEN, LayerRequest, Prepared, Refused, find
from lazysnap.snapshotter.locks import DatabaseThread, KeyLocks
from lazysnap.snapshotter.unpack_ahead import ImagePull, UnpackAhead
from lazysnap.store.records import Usage
from lazysnap.store.snapshots import SnapshotStore
from lazysnap.unpack.process import Answer

_log = log.get(__name__)
_REGISTRY_FAILS = frozenset(
    {"registry-error", "registry-unreachable", "not-in-registry", "unauthorized"}
)
"""Reasons why a layer is not lazy after which asking the registry again would only take time."""


class _Filled(NamedTuple):
    """A layer whose files are in the directory of its snapshot to be."""

    layer: LayerBlob
    answer: Answer
    usage: Usage
    ahead: bool


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
        """From now on, unpack layers also before they are asked for.

        Args:
            nursery: where they are unpacked.
        """
        self._ahead.start(nursery)

    def client(self, labels: Mapping[str, str]) -> AbstractContextManager[ImagePull]:
        """A client asks for a layer and waits in the body, however the layer is brought here.

        Args:
            labels: of its request.
        """
        return self._ahead.client(labels)

    async def prepare(
        self, request: LayerRequest, reason: str, pull: ImagePull
    ) -> Prepared | Refused:
        """Try to answer a request with a snapshot that the daemon fills.

        Args:
            request: for the snapshot of a layer.
            reason: why the layer is not lazy.
            pull: from `client`.

        Returns:
            Whether the snapshot is there now, or why it is not possible.

        Raises:
            NotFound: the parent was removed meanwhile.
            Internal: the database failed.
        """
        if reason in _REGISTRY_FAILS:
            return Refused(reason)
        chain = "" if request.below is None else request.below.snapshot.labels.get(SNAPSHOT_REF)
        if chain is None:
            return Refused("parent-without-chain-id")
        async with self._names.hold(request.name):
            found = await find(request, self._store, self._db_thread)
            if found is None:
                return await self._make(request, chain, reason, pull)
            if request.is_met_by(found, remote=False):
                return Prepared(request.name)
            return Refused(NAME_TAKEN)

    async def _make(
        self, request: LayerRequest, chain: str, reason: str, pull: ImagePull
    ) -> Prepared | Refused:
        self._ahead.begin(pull, request.labels)
        with self._housekeeping.building() as directory:
            try:
                filled = await self._fill(request, directory, chain, pull)
            except LazysnapError as error:
                self._housekeeping.expect_garbage()
                _log.warning("a layer is left to containerd", name=request.name, error=error)
                return Refused(error.reason)
            except Exception:
                self._housekeeping.expect_garbage()
                _log.exception("unpacking a layer failed")
                return Refused("internal")

            def place() -> None:
                labels = {**request.labels, REASON: reason}
                with self._store.committing(
                    request.name, request.parent, labels, filled.usage, parent_id=request.parent_id
                ) as number:
                    self._dirs.place(directory, number)

            await self._db_thread.run(place)
        _tell(request.name, filled)
        return Prepared(request.name)

    async def _fill(
        self, request: LayerRequest, directory: str, chain: str, pull: ImagePull
    ) -> _Filled:
        """Build the directory of a snapshot with the files of a layer in it."""

        def build() -> str:
            return self._dirs.build(directory, work=False, parent_id=request.parent_id)

        layer = await self._unpacker.find(request.labels)
        target = await trio.to_thread.run_sync(build)
        lowers = [self._dirs.fs(number) for number in request.lower_ids]
        answer = await self._ahead.take(pull, layer, target, lowers)
        ahead = answer is not None
        if answer is None:
            answer = await self._unpacker.unpack(layer, target, lowers)
        _check_chain(layer, chain, answer.diff_id, request.ref)
        if self._sync:
            await trio.to_thread.run_sync(mounts.sync_filesystem, target)
        usage = await trio.to_thread.run_sync(directory_tree.measure, target)
        return _Filled(layer, answer, usage, ahead)


def _tell(name: str, filled: _Filled) -> None:
    layer, answer, _, ahead = filled
    if answer.ignored_xattrs:
        _log.warning("xattrs of a layer were left out", layer=layer.digest, xattrs=answer.examples)
    _log.info(
        "a layer is unpacked", name=name, entries=answer.entries, bytes=answer.size, ahead=ahead
    )


def _check_chain(layer: LayerBlob, chain: str, diff_id: str, wanted: str) -> None:
    found = oci.chain_id(Digest.parse(chain) if chain else None, Digest.parse(diff_id))
    if found != wanted:
        raise DigestMismatch(
            f"layer {layer.digest} unpacks to {diff_id}, which makes {found} and not {wanted}"
        )
