# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 connection of the pool, whose bodies are handed on as the socket gave them.

h11 copies a body four times. Here it writes the request and reads the head of the answer, which is
what is hard to get right; if that says how long the body is, what follows does not go through it.
Any other body does. Takes the place of httpcore's own connection in its pool, and raises its errors.
"""

from __future__ import annotations

import enum
import ssl
from collections.abc import AsyncIterable

import h11
import httpcore
import trio

_HEAD_MOST = 100 << 10
_HEAD_READ = 64 << 10
"""Bytes per receive while h11 reads on; all of them are copied several times."""
_BODY_READ = 1 << 20
_SLOW_BODY_READ = 256 << 10
_SLOW_SECONDS = 0.02
"""Who takes longer to ask for more is limited or held back, and gets small pieces, so that others who
share the line with it do not wait for a large one."""


class _State(enum.Enum):
    NEW = enum.auto()
    ACTIVE = enum.auto()
    IDLE = enum.auto()
    CLOSED = enum.auto()


class Connection(httpcore.AsyncConnectionInterface):
    """A connection to one server, made at its first request.

    Args:
        origin: the server.
        context: for https.
        keep_alive_seconds: for how long it may be idle.
    """

    def __init__(
        self, origin: httpcore.Origin, context: ssl.SSLContext, keep_alive_seconds: float
    ) -> None:
        self._origin = origin
        self._context = context
        self._keep_alive_seconds = keep_alive_seconds
        self._expires = float("inf")
        self._state = _State.NEW
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send a request and receive the head of its answer; called by the pool."""
        if self._state not in (_State.NEW, _State.IDLE):
            raise httpcore.ConnectionNotAvailable
        self._state = _State.ACTIVE
        timeouts = request.extensions.get("timeout", {})
        try:
            if self._stream is None:
                self._stream = await self._connect(timeouts.get("connect"))
            exchange = _Exchange(self._stream, timeouts.get("read"))
            await exchange.send(request, timeouts.get("write"))
            head = await exchange.receive_head()
        except h11.LocalProtocolError as error:
            await self._abort()
            raise httpcore.LocalProtocolError(str(error)) from error
        except BaseException:
            await self._abort()
            raise
        length = _length(request, head)
        return httpcore.Response(
            status=head.status_code,
            headers=head.headers.raw_items(),
            content=_ParsedBody(self, exchange)
            if length is None
            else _SizedBody(self, exchange, length),
            extensions={
                "http_version": b"HTTP/" + head.http_version,
                "reason_phrase": head.reason,
                "network_stream": self._stream,
            },
        )

    async def _connect(self, timeout: float | None) -> httpcore.AsyncNetworkStream:
        host = self._origin.host.decode("ascii")
        stream = await httpcore.TrioBackend().connect_tcp(host, self._origin.port, timeout)
        if self._origin.scheme != b"https":
            return stream
        self._context.set_alpn_protocols(["http/1.1"])
        try:
            return await stream.start_tls(self._context, host, timeout)
        except BaseException:
            # httpcore forgets the socket when a handshake is cancelled.
            with trio.CancelScope(shield=True):
                await stream.aclose()
            raise

    async def release(self, *, clean: bool) -> None:
        """Become idle after an exchange, or close.

        Args:
            clean: both sides have said all, and want to go on.
        """
        if clean and self._state is _State.ACTIVE:
            self._state = _State.IDLE
            self._expires = trio.current_time() + self._keep_alive_seconds
        else:
            await self._abort()

    async def _abort(self) -> None:
        with trio.CancelScope(shield=True):
            await self.aclose()

    async def aclose(self) -> None:
        """Close it, whatever it does."""
        self._state = _State.CLOSED
        if self._stream is not None:
            await self._stream.aclose()

    def can_handle_request(self, origin: httpcore.Origin) -> bool:
        """Whether it leads to a server."""
        return origin == self._origin

    def is_available(self) -> bool:
        """Whether it can take a request of anybody's; a new one is for who had it made."""
        return self._state is _State.IDLE

    def has_expired(self) -> bool:
        """Whether it was idle for too long, or the server has closed it or says what it should not."""
        if self._state is not _State.IDLE or self._stream is None:
            return False
        return trio.current_time() > self._expires or self._stream.get_extra_info("is_readable")

    def is_idle(self) -> bool:
        """Whether it waits for a request."""
        return self._state is _State.IDLE

    def is_closed(self) -> bool:
        """Whether the pool should forget it."""
        return self._state is _State.CLOSED

    def info(self) -> str:
        """For people."""
        return f"{str(self._origin)!r}, HTTP/1.1, {self._state.name}"


class _Exchange:
    """One request and its answer, by h11 up to the body."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, timeout: float | None) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_MOST)
        self._stream = stream
        self._timeout = timeout

    async def send(self, request: httpcore.Request, timeout: float | None) -> None:
        """Send all of a request, unless the server stops listening."""
        assert isinstance(request.stream, AsyncIterable)
        head = h11.Request(
            method=request.method, target=request.url.target, headers=request.headers
        )
        try:
            await self._write(head, timeout)
            async for piece in request.stream:
                await self._write(h11.Data(data=piece), timeout)
            await self._write(h11.EndOfMessage(), timeout)
        except httpcore.WriteError:
            # It may have answered already that it does not want the rest.
            pass

    async def _write(self, event: h11.Event, timeout: float | None) -> None:
        await self._stream.write(self._h11.send(event) or b"", timeout)

    async def receive_head(self) -> h11.Response:
        """The head of the final answer."""
        while not isinstance(event := await self.receive_event(), h11.Response):
            assert isinstance(event, h11.InformationalResponse)
        return event

    async def receive_event(self) -> h11.Event | type[h11.PAUSED]:
        """What h11 makes of the next bytes."""
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise httpcore.RemoteProtocolError(str(error)) from error
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]  # h11's types know no `is not`
            data = await self.receive(_HEAD_READ)
            if not data and self._h11.their_state is h11.SEND_RESPONSE:
                raise httpcore.RemoteProtocolError("the server disconnected without an answer")
            self._h11.receive_data(data)

    async def receive(self, most: int) -> bytes:
        """What the socket has, without h11; nothing at the end of the connection."""
        return await self._stream.read(most, self._timeout)

    def beyond(self) -> bytes:
        """What was received that h11 has not looked at."""
        return self._h11.trailing_data[0]

    @property
    def reusable(self) -> bool:
        """Whether the request was sent to its end, and neither side wants to close afterwards."""
        return self._h11.our_state is h11.DONE


class _ParsedBody:
    """A body of which only h11 knows the end.

    This and the next are objects and not generators, so that nothing is left suspended.
    """

    def __init__(self, connection: Connection, exchange: _Exchange) -> None:
        self._connection = connection
        self._exchange = exchange
        self._ended = False

    def __aiter__(self) -> _ParsedBody:
        return self

    async def __anext__(self) -> bytes:
        if not self._ended:
            event = await self._exchange.receive_event()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            self._ended = True
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Give up the rest; called once, by the pool."""
        exchange = self._exchange
        await self._connection.release(
            clean=self._ended and exchange.reusable and not exchange.beyond()
        )


class _SizedBody:
    """A body of which the head told the length; called as above."""

    def __init__(self, connection: Connection, exchange: _Exchange, length: int) -> None:
        self._connection = connection
        self._exchange = exchange
        beyond = exchange.beyond()
        self._first = beyond[:length]
        self._left = length
        self._handed_on = float("-inf")
        self._reusable = exchange.reusable and len(beyond) <= length

    def __aiter__(self) -> _SizedBody:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        piece, self._first = self._first, b""
        if not piece:
            slow = trio.current_time() - self._handed_on > _SLOW_SECONDS
            most = _SLOW_BODY_READ if slow else _BODY_READ
            piece = await self._exchange.receive(min(self._left, most))
            if not piece:
                raise httpcore.RemoteProtocolError(f"{self._left} bytes of the body are missing")
        self._left -= len(piece)
        self._handed_on = trio.current_time()
        return piece

    async def aclose(self) -> None:
        """Give up the rest; called once, by the pool."""
        await self._connection.release(clean=not self._left and self._reusable)


def _length(request: httpcore.Request, head: h11.Response) -> int | None:
    """Bytes of a body of known length; for all other cases see RFC 9112, section 6.3."""
    headers = dict(head.headers)
    if request.method != b"GET" or head.status_code not in (200, 206):
        return None
    if b"transfer-encoding" in headers or b"content-length" not in headers:
        return None
    # h11 has made sure that it is one, and a number.
    return int(headers[b"content-length"])
