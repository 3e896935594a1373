# SPDX-License-Identifier: Apache-2.0
"""A small remote snapshotter for tests of clients: keeps to the contract, mounts nothing lazily.

The layers it is given as tars count as remote: it unpacks them into a directory in Prepare, commits
and answers AlreadyExists. All others get ordinary overlay mounts. Containers run on the result.

    with RemoteSnapshotter(tmp_path) as remote, PrivateContainerd(tmp_path, proxies={"r": remote.address}):
        remote.layers[layer_digest] = tar_bytes
        ...
        remote.prepared       # labels of each Prepare that asked for a remote snapshot
"""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.empty_pb2 import Empty

from lazysnap.containerd._pb import snapshots_pb2 as pb
from lazysnap.containerd._pb.types.mount_pb2 import Mount

_PREFIX = "containerd.io/snapshot/"
_ASKS = "containerd.io/snapshot.ref"


@dataclass
class _Snapshot:
    number: int
    parent: str
    kind: pb.Kind
    labels: dict[str, str]


class RemoteSnapshotter:
    """See the top of this file.

    Attributes:
        layers: blob digest to uncompressed tar, for layers that are remote.
        reason: if set, the label lazysnap.reason of snapshots that are asked for and not remote.
        lies: answer AlreadyExists and have no snapshot.
        on_prepare: called with the labels of each request for a remote snapshot.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "remote"
        self.address = str(self.directory / "r.sock")
        self.layers: dict[str, bytes] = {}
        self.prepared: list[dict[str, str]] = []
        self.reason = ""
        self.lies = False
        self.on_prepare: Callable[[Mapping[str, str]], None] = lambda labels: None
        self._snapshots: dict[str, _Snapshot] = {}
        self._lock = threading.RLock()
        self._next = 1
        self._server: grpc.Server | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        requests: dict[str, Any] = {
            "Prepare": pb.PrepareSnapshotRequest,
            "View": pb.ViewSnapshotRequest,
            "Mounts": pb.MountsRequest,
            "Commit": pb.CommitSnapshotRequest,
            "Remove": pb.RemoveSnapshotRequest,
            "Stat": pb.StatSnapshotRequest,
            "Usage": pb.UsageRequest,
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self, f"_{name.lower()}"), request.FromString, _serialize
            )
            for name, request in requests.items()
        }
        handlers["List"] = grpc.unary_stream_rpc_method_handler(
            self._list, pb.ListSnapshotsRequest.FromString, _serialize
        )
        self._server = grpc.server(ThreadPoolExecutor(8))
        service = "containerd.services.snapshots.v1.Snapshots"
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, handlers),)
        )
        self._server.add_insecure_port(f"unix:{self.address}")
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.stop(None).wait()

    def _prepare(
        self, request: pb.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.PrepareSnapshotResponse:
        labels = dict(request.labels)
        asks = _ASKS in labels
        if asks:
            self.prepared.append(labels)
            self.on_prepare(labels)
        tar = self.layers.get(labels.get(_PREFIX + "cri.layer-digest", "")) if asks else None
        with self._lock:
            name = f"{labels[_ASKS]} on {request.parent}" if tar is not None else request.key
            if name in self._snapshots or (asks and self.lies):
                _fail(context, grpc.StatusCode.ALREADY_EXISTS, name)
            if tar is None:
                if asks and self.reason:
                    labels[_PREFIX + "lazysnap.reason"] = self.reason
                self._add(name, request.parent, pb.ACTIVE, labels)
                return pb.PrepareSnapshotResponse(mounts=self._overlay(name))
            labels[_PREFIX + "remote"] = "remote snapshot"
            snapshot = self._add(name, request.parent, pb.COMMITTED, labels)
            with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
                archive.extractall(self._path(snapshot, "fs"))
            return _fail(context, grpc.StatusCode.ALREADY_EXISTS, name)

    def _view(
        self, request: pb.ViewSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.ViewSnapshotResponse:
        with self._lock:
            self._add(request.key, request.parent, pb.VIEW, dict(request.labels))
            return pb.ViewSnapshotResponse(mounts=self._overlay(request.key))

    def _mounts(
        self, request: pb.MountsRequest, context: grpc.ServicerContext
    ) -> pb.MountsResponse:
        self._get(request.key, context)
        return pb.MountsResponse(mounts=self._overlay(request.key))

    def _commit(self, request: pb.CommitSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        with self._lock:
            snapshot = self._get(request.key, context)
            del self._snapshots[request.key]
            snapshot.kind, snapshot.labels = pb.COMMITTED, dict(request.labels)
            self._snapshots[request.name] = snapshot
        return Empty()

    def _remove(self, request: pb.RemoveSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        with self._lock:
            self._get(request.key, context)
            if any(other.parent == request.key for other in self._snapshots.values()):
                _fail(context, grpc.StatusCode.FAILED_PRECONDITION, "has children")
            del self._snapshots[request.key]
        return Empty()

    def _stat(
        self, request: pb.StatSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.StatSnapshotResponse:
        return pb.StatSnapshotResponse(info=_info(request.key, self._get(request.key, context)))

    def _usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageResponse:
        self._get(request.key, context)
        return pb.UsageResponse()

    def _list(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListSnapshotsResponse]:
        with self._lock:  # containerd checks the filter itself
            infos = [_info(key, snapshot) for key, snapshot in self._snapshots.items()]
        yield pb.ListSnapshotsResponse(info=infos)

    def _add(self, key: str, parent: str, kind: pb.Kind, labels: dict[str, str]) -> _Snapshot:
        snapshot = _Snapshot(self._next, parent, kind, labels)
        self._next += 1
        for part in ("fs", "work"):
            self._path(snapshot, part).mkdir(parents=True)
        self._path(snapshot, "fs").chmod(0o755)
        self._snapshots[key] = snapshot
        return snapshot

    def _get(self, key: str, context: grpc.ServicerContext) -> _Snapshot:
        if key not in self._snapshots:
            _fail(context, grpc.StatusCode.NOT_FOUND, key)
        return self._snapshots[key]

    def _path(self, snapshot: _Snapshot, part: str) -> Path:
        return self.directory / str(snapshot.number) / part

    def _overlay(self, key: str) -> list[Mount]:
        snapshot = self._snapshots[key]
        lower, parent = [], snapshot.parent
        while parent:
            lower.append(str(self._path(self._snapshots[parent], "fs")))
            parent = self._snapshots[parent].parent
        own = str(self._path(snapshot, "fs"))
        if not lower:
            return [Mount(type="bind", source=own, options=["rbind", "rw"])]
        options = [f"lowerdir={':'.join(lower)}"]
        if snapshot.kind == pb.ACTIVE:
            options += [f"upperdir={own}", f"workdir={self._path(snapshot, 'work')}"]
        return [Mount(type="overlay", source="overlay", options=options)]


def _info(key: str, snapshot: _Snapshot) -> pb.Info:
    return pb.Info(name=key, parent=snapshot.parent, kind=snapshot.kind, labels=snapshot.labels)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _fail(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort raises")
