# SPDX-License-Identifier: Apache-2.0
"""The Snapshots service of containerd's API, on a unix socket.

Translates between protobuf messages and the snapshotter's values, and between threads of grpcio and
trio: this is the only module where the two meet. Each call is a task of trio's that ends when the
client goes away. Decides nothing about snapshots, and does not need containerd's namespace header
(garbage collection calls without one). Message definitions: containerd
api/services/snapshots/v1/snapshots.proto.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar
from urllib.parse import quote

import grpc
import trio
from google.protobuf.empty_pb2 import Empty

from lazysnap import filters, log, tracing
from lazysnap.containerd._pb import snapshots_pb2 as pb
from lazysnap.containerd._pb import snapshots_pb2_grpc as pb_grpc
from lazysnap.containerd._pb.types.mount_pb2 import Mount as MountMessage
from lazysnap.errors import ConfigError, Internal, LazysnapError
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.overlay import Kind, Mount
from lazysnap.snapshotter import Snapshotter
from lazysnap.store.records import Snapshot

T = TypeVar("T")

MAX_MESSAGE = 16 << 20
"""Bytes in one message either way, as containerd's own client and server have it."""

_WORKERS = 32
_BATCH = 100
_STOP_GRACE = 1.0  # seconds for calls that are under way when the daemon stops
_MAX_SOCKET_PATH = 107  # bytes, unix(7)
_NANOSECONDS = 1_000_000_000
_KINDS = {Kind.VIEW: pb.VIEW, Kind.ACTIVE: pb.ACTIVE, Kind.COMMITTED: pb.COMMITTED}

_log = log.get(__name__)


async def serve(
    snapshotter: Snapshotter,
    address: str,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; calls under way get a second to end.

    Args:
        snapshotter: started.
        address: path of the socket; its directory is made if missing.
        task_status: told when clients can connect.

    Raises:
        ConfigError: another daemon serves this socket, or the path cannot be a socket.
        Internal: the socket cannot be made.
    """
    with _owned_socket(address):
        calls = _Calls(trio.lowlevel.current_trio_token())
        workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="grpc")
        server = grpc.server(
            workers,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
            ],
        )
        pb_grpc.add_SnapshotsServicer_to_server(  # type: ignore[no-untyped-call]  # generated
            _Servicer(snapshotter, calls), server
        )
        _listen(server, address)
        _log.info("serving", address=address)
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                # When the grace is over grpc ends the calls, which cancels their tasks.
                await trio.to_thread.run_sync(server.stop(_STOP_GRACE).wait)
                await calls.ended()
            workers.shutdown(wait=False)


def _listen(server: grpc.Server, address: str) -> None:
    before = os.umask(0o177)  # so that no other user can connect, not even for a moment
    try:
        server.add_insecure_port("unix:" + quote(address))
        server.start()
    except RuntimeError as error:
        raise Internal(f"cannot listen on {address}: {error}") from error
    finally:
        os.umask(before)


@contextmanager
def _owned_socket(address: str) -> Iterator[None]:
    """Own the path of a socket, and remove what a dead owner has left there.

    The lock is on a file of its own and that file stays: a socket cannot be locked, and deleting a
    locked file lets two processes lock two files of one name.
    """
    if len(os.fsencode(address)) > _MAX_SOCKET_PATH:
        raise ConfigError(
            f"the socket path {address} is longer than the {_MAX_SOCKET_PATH} bytes the kernel allows",
            hint="choose a shorter one",
        )
    lock_path = address + ".lock"
    try:
        os.makedirs(os.path.dirname(address) or ".", mode=0o711, exist_ok=True)
        lock = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Internal(f"cannot make {error.filename}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another lazysnap serves {address}",
                hint="stop it first, or choose another address",
                reason="address-in-use",
            ) from None
        _remove_stale(address)
        try:
            yield
        finally:
            # grpc does this too, when it is stopped in order
            with suppress(FileNotFoundError):
                os.unlink(address)
    finally:
        os.close(lock)


def _remove_stale(address: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(address).st_mode):
            raise ConfigError(f"{address} exists and is not a socket", hint="move it away")
        if _answers(address):
            raise ConfigError(
                f"another program listens on {address}", hint="choose another address"
            )
        os.unlink(address)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Internal(f"cannot remove the old socket {address}: {error.strerror}") from error


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return False
        return True


class _Calls:
    """The calls that are under way, each a thread of grpcio's that waits for a task of trio's."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self._count = 0
        self._idle = trio.Event()
        self._idle.set()

    async def ended(self) -> None:
        """Wait until no call is under way."""
        await self._idle.wait()

    def run(
        self, context: grpc.ServicerContext, function: Callable[..., Awaitable[T]], *args: object
    ) -> T:
        """Run an operation for a client, from a thread of grpcio's.

        Raises:
            Exception: what `context.abort` raises; the status is set.
        """
        scope = trio.CancelScope()
        if not context.add_callback(lambda: self._cancel(scope)):
            context.abort(grpc.StatusCode.CANCELLED, "the client has gone away")
        name = function.__name__
        try:
            with tracing.span(name), counts.timing(families.GRPC_SECONDS, name):
                return trio.from_thread.run(
                    self._run, scope, function, args, trio_token=self._token
                )
        except LazysnapError as error:
            counts.add(families.GRPC_ERRORS, f"{name},{error.grpc_code}")
            self._abort(context, error)
        except (trio.Cancelled, trio.RunFinishedError):
            context.abort(grpc.StatusCode.UNAVAILABLE, "lazysnap is stopping")
        except Exception as error:
            counts.add(families.GRPC_ERRORS, f"{name},INTERNAL")
            _log.exception("a call failed")
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    async def _run(
        self, scope: trio.CancelScope, function: Callable[..., Awaitable[T]], args: Iterable[object]
    ) -> T:
        if self._count == 0:
            self._idle = trio.Event()
        self._count += 1
        try:
            with scope:
                return await function(*args)
            raise _GoneError("the client has gone away")
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    def _cancel(self, scope: trio.CancelScope) -> None:
        # grpcio calls this at the end of every call; cancelling a finished scope does nothing
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(scope.cancel)

    @staticmethod
    def _abort(context: grpc.ServicerContext, error: LazysnapError) -> NoReturn:
        message = error.message if error.hint is None else f"{error.message} ({error.hint})"
        context.abort(grpc.StatusCode[error.grpc_code], message)


class _GoneError(LazysnapError):
    """The client has gone away; nobody reads this."""

    grpc_code = "CANCELLED"


class _Servicer(pb_grpc.SnapshotsServicer):
    """The methods of the service; runs in threads of grpcio's."""

    def __init__(self, snapshotter: Snapshotter, calls: _Calls) -> None:
        self._snapshotter = snapshotter
        self._run = calls.run

    def Prepare(
        self, request: pb.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.PrepareSnapshotResponse:
        mounts = self._run(
            context, self._snapshotter.prepare, request.key, request.parent, dict(request.labels)
        )
        return pb.PrepareSnapshotResponse(mounts=map(_mount, mounts))

    def View(
        self, request: pb.ViewSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.ViewSnapshotResponse:
        mounts = self._run(
            context, self._snapshotter.view, request.key, request.parent, dict(request.labels)
        )
        return pb.ViewSnapshotResponse(mounts=map(_mount, mounts))

    def Mounts(self, request: pb.MountsRequest, context: grpc.ServicerContext) -> pb.MountsResponse:
        mounts = self._run(context, self._snapshotter.mounts, request.key)
        return pb.MountsResponse(mounts=map(_mount, mounts))

    def Commit(self, request: pb.CommitSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        what = (request.name, request.key, dict(request.labels), request.parent)
        self._run(context, self._snapshotter.commit, *what)
        return Empty()

    def Remove(self, request: pb.RemoveSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        self._run(context, self._snapshotter.remove, request.key)
        return Empty()

    def Stat(
        self, request: pb.StatSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.StatSnapshotResponse:
        found = self._run(context, self._snapshotter.stat, request.key)
        return pb.StatSnapshotResponse(info=_info(found))

    def Update(
        self, request: pb.UpdateSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.UpdateSnapshotResponse:
        updated = self._run(
            context,
            self._snapshotter.update,
            request.info.name,
            dict(request.info.labels),
            list(request.update_mask.paths),
        )
        return pb.UpdateSnapshotResponse(info=_info(updated))

    def List(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListSnapshotsResponse]:
        async def list_filters() -> filters.Filter:
            return filters.compile(request.filters)

        match = self._run(context, list_filters)
        batch: list[pb.Info] = []
        after: str | None = None
        while True:
            found, after = self._run(context, self._snapshotter.list, match, after)
            batch.extend(map(_info, found))
            while len(batch) >= _BATCH or (batch and after is None):
                yield pb.ListSnapshotsResponse(info=batch[:_BATCH])
                del batch[:_BATCH]
            if after is None:
                return

    def Usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageResponse:
        usage = self._run(context, self._snapshotter.usage, request.key)
        return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(self, request: pb.CleanupRequest, context: grpc.ServicerContext) -> Empty:
        self._run(context, self._snapshotter.cleanup)
        return Empty()


def _mount(mount: Mount) -> MountMessage:
    return MountMessage(
        type=mount.type, source=mount.source, target=mount.target, options=mount.options
    )


def _info(snapshot: Snapshot) -> pb.Info:
    info = pb.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=_KINDS[snapshot.kind],
        labels=snapshot.labels,
    )
    for stamp, value in (
        (info.created_at, snapshot.created_ns),
        (info.updated_at, snapshot.updated_ns),
    ):
        stamp.seconds, stamp.nanos = divmod(value, _NANOSECONDS)
    return info
