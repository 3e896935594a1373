# SPDX-License-Identifier: Apache-2.0
"""gRPC calls to containerd from trio: the only place where grpcio's threads meet this client.

A unary call is a grpcio future whose callback wakes the trio task, so that no thread waits. Messages
of a stream are awaited in a worker thread. Cancelling the trio scope cancels the call at the server.
Status codes become the classes of `lazysnap.errors`; no other exception leaves this module.
Knows no service: the modules beside it name methods and messages.
"""

from __future__ import annotations

import contextlib
import errno
import queue
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc
import trio

from lazysnap.errors import (
    AlreadyExists,
    ContainerdError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    LazysnapError,
    NotFound,
    Unavailable,
)

MAX_MESSAGE = 16 << 20
"""containerd's own limit in bytes; grpcio's default of 4 MiB is too small for its answers."""

SECONDS = 30.0
"""Deadline of calls that only touch metadata."""

_ERRORS: dict[grpc.StatusCode, type[LazysnapError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.INTERNAL: Internal,
}
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    # A restarted containerd is found again within a second, not after the default two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


class Message(Protocol):
    """What is needed of a protobuf message."""

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        """The wire form."""
        ...

    @classmethod
    def FromString(cls, s: bytes) -> Self:  # noqa: N802 - protobuf's name
        """Parse the wire form."""
        ...


RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Connection:
    """A channel to containerd with the metadata that goes along with each call.

    Args:
        address: path of containerd's socket.
        namespace: containerd namespace of all calls.
        lease: id of the lease that everything created joins, if any.
    """

    def __init__(
        self, address: str, namespace: str, *, lease: str = "", channel: grpc.Channel | None = None
    ) -> None:
        self.address = address.removeprefix("unix://")
        self.namespace = namespace
        self.lease = lease
        self._channel = channel
        metadata = {"containerd-namespace": namespace, "containerd-lease": lease}
        self._metadata = tuple((key, value) for key, value in metadata.items() if value)

    async def open(self) -> None:
        """Check that the socket answers, then make the channel.

        Raises:
            ContainerdError: nobody listens there, or we may not connect.
        """
        await self.probe()
        self._channel = grpc.insecure_channel(f"unix:{self.address}", options=_OPTIONS)

    def close(self) -> None:
        """Close the channel; calls under way fail."""
        if self._channel is not None:
            self._channel.close()

    def with_lease(self, lease: str) -> Connection:
        """The same channel, with what is created joining a lease."""
        return Connection(self.address, self.namespace, lease=lease, channel=self._channel)

    async def probe(self) -> None:
        """Try to connect to the socket.

        Raises:
            ContainerdError: with a hint that fits the reason.
        """
        try:
            with trio.fail_after(SECONDS):
                stream = await trio.open_unix_socket(self.address)
            await stream.aclose()
        except trio.TooSlowError as error:
            raise ContainerdError(f"{self.address} does not accept connections") from error
        except (OSError, ValueError) as error:
            raise _unreachable(self.address, error) from error

    async def unary(
        self,
        method: str,
        request: Message,
        response: type[ResponseT],
        *,
        what: str,
        timeout: float = SECONDS,
    ) -> ResponseT:
        """One request, one response.

        Args:
            method: `package.Service/Method`.
            request: the message to send.
            response: class of the answer.
            what: what is being done to what, for error messages.
            timeout: deadline in seconds.

        Raises:
            LazysnapError: of the class that fits the status.
        """
        call = self._open().unary_unary(
            f"/{method}",
            request_serializer=_serialize,
            response_deserializer=response.FromString,
        )
        future = call.future(request, timeout=timeout, metadata=self._metadata)
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        future.add_done_callback(lambda _future: _wake(token, done))
        try:
            await done.wait()
        except BaseException:
            future.cancel()
            raise
        try:
            result: ResponseT = future.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise await self.translate(error, what) from error
        return result

    async def collect(
        self,
        method: str,
        request: Message,
        response: type[ResponseT],
        *,
        what: str,
        timeout: float = SECONDS,
    ) -> list[ResponseT]:
        """All responses of a server stream; arguments and errors as for `unary`."""
        call = self._open().unary_stream(
            f"/{method}",
            request_serializer=_serialize,
            response_deserializer=response.FromString,
        )(request, timeout=timeout, metadata=self._metadata)
        try:
            return await trio.to_thread.run_sync(list, call, abandon_on_cancel=True)
        except grpc.RpcError as error:
            raise await self.translate(error, what) from error
        finally:
            call.cancel()

    @asynccontextmanager
    async def exchange(
        self, method: str, request: type[RequestT], response: type[ResponseT], *, what: str
    ) -> AsyncIterator[Exchange[RequestT, ResponseT]]:
        """A stream on which each request is answered by one response."""
        requests: queue.SimpleQueue[RequestT | None] = queue.SimpleQueue()
        call = self._open().stream_stream(
            f"/{method}",
            request_serializer=_serialize,
            response_deserializer=response.FromString,
        )(iter(requests.get, None), metadata=self._metadata)
        try:
            yield Exchange(self, requests, call, what)
        finally:
            requests.put(None)  # ends grpcio's thread, which waits for the next request
            call.cancel()

    async def translate(self, error: Exception, what: str) -> LazysnapError:
        """The error of our family for one of grpcio."""
        if not isinstance(error, grpc.RpcError) or not isinstance(error, grpc.Call):
            return ContainerdError(f"{what}: {error}")
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unavailable(f"{what}: containerd did not answer in time", reason="timeout")
        if code is grpc.StatusCode.UNAVAILABLE:
            # grpcio uses the same code for a dead socket and for what containerd says of a plugin.
            try:
                await self.probe()
            except ContainerdError as unreachable:
                return unreachable
        known = _ERRORS.get(code)
        if known is not None:
            return known(f"{what}: {details}")
        return ContainerdError(f"{what}: {details} ({code.name.lower().replace('_', ' ')})")

    def _open(self) -> grpc.Channel:
        assert self._channel is not None, "not connected"
        return self._channel


class Exchange(Generic[RequestT, ResponseT]):
    """An open lock-step stream; made by `Connection.exchange`."""

    def __init__(
        self,
        connection: Connection,
        requests: queue.SimpleQueue[RequestT | None],
        call: Any,
        what: str,
    ) -> None:
        self._connection = connection
        self._requests = requests
        self._call = call
        self._what = what

    async def ask(self, request: RequestT, *, timeout: float = SECONDS) -> ResponseT:
        """Send a request and wait for its response.

        When this is cancelled, the stream stays open until its block ends, so that a caller can
        still undo what it holds; the abandoned thread ends with the stream.

        Raises:
            LazysnapError: as for `Connection.unary`; the stream is then at its end.
        """
        self._requests.put(request)
        try:
            with trio.fail_after(timeout):
                response: ResponseT | None = await trio.to_thread.run_sync(
                    next, self._call, None, abandon_on_cancel=True
                )
        except trio.TooSlowError as error:
            message = f"{self._what}: containerd did not answer in time"
            raise Unavailable(message, reason="timeout") from error
        except grpc.RpcError as error:
            raise await self._connection.translate(error, self._what) from error
        if response is None:
            raise ContainerdError(f"{self._what}: containerd ended the stream")
        return response


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _wake(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    # The run may have ended while a cancelled call was still on its way.
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(done.set)


def _unreachable(address: str, error: OSError | ValueError) -> ContainerdError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        text, hint = "there is no such socket", "is containerd running? --address names its socket"
    elif number == errno.ECONNREFUSED:
        text, hint = "nobody listens on this socket", "start containerd, or name another --address"
    elif number in (errno.EACCES, errno.EPERM):
        text, hint = "permission denied", "containerd's socket is root's: run this as root"
    else:
        text, hint = str(error), "is this the path of containerd's socket?"
    return ContainerdError(
        f"cannot connect to containerd at {address}: {text}", hint=hint, reason="no-containerd"
    )


def labels_mask(keys: Iterable[str]) -> list[str]:
    """Field mask paths that change only these labels."""
    return [f"labels.{key}" for key in keys]
