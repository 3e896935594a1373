# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 connection of the pool, whose bodies are handed on as the socket gave them.

h11 copies a body four times. Here it writes the request and reads the head of the answer, which is
what is hard to get right; if that says how long the body is, what follows does not go through it.
Any other body does. Raises the errors of httpcore, as its own connections do.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterable, Callable, Mapping
from typing import NamedTuple

import h11
import httpcore
import httpx
import trio

_HEAD_MOST = 100 << 10
_HEAD_READ = 64 << 10
"""Bytes per receive while h11 reads on; all of them are copied several times."""
_BODY_READ = 1 << 20
_SLOW_BODY_READ = 256 << 10
_SLOW_SECONDS = 0.02
"""Who takes longer to ask for more is limited or held back, and gets small pieces, so that others who
share the line with it do not wait for a large one."""


class Origin(NamedTuple):
    """A server, and how to speak to it."""

    scheme: str
    host: str
    port: int


class Connection:
    """A connection to one server, made at its first request; has one request at a time.

    Args:
        origin: the server.
        context: for https.
        released: called when it can have another request, or was closed by the end of one.

    Attributes:
        origin: as above.
        is_closed: whether it is of no more use.
        idle_since: when its last request ended, by trio's clock.
    """

    def __init__(
        self, origin: Origin, context: ssl.SSLContext, released: Callable[[Connection], None]
    ) -> None:
        self.origin = origin
        self.is_closed = False
        self.idle_since = float("-inf")
        self._context = context
        self._released = released
        self._socket: trio.SocketStream | None = None
        self._stream: trio.abc.Stream | None = None

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request and receive the head of its answer, whose body is to be closed.

        Raises:
            httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError: no answer came. The
                connection is closed, after this and anything else that is raised.
        """
        timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        try:
            if self._stream is None:
                self._stream = await self._connect(timeouts.get("connect"))
            exchange = _Exchange(self._stream, timeouts)
            await exchange.send(request)
            head = await exchange.receive_head()
        except h11.LocalProtocolError as error:
            await self.release(clean=False)
            raise httpcore.LocalProtocolError(str(error)) from error
        except BaseException:
            await self.release(clean=False)
            raise
        length = _length(request, head)
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_ParsedBody(self, exchange)
            if length is None
            else _SizedBody(self, exchange, length),
            extensions={
                "http_version": b"HTTP/" + head.http_version,
                "reason_phrase": head.reason,
            },
        )

    async def _connect(self, timeout: float | None) -> trio.abc.Stream:
        with trio.move_on_after(_seconds(timeout)):
            try:
                self._socket = await trio.open_tcp_stream(self.origin.host, self.origin.port)
                if self.origin.scheme != "https":
                    return self._socket
                self._context.set_alpn_protocols(["http/1.1"])
                stream = trio.SSLStream(
                    self._socket,
                    self._context,
                    server_hostname=self.origin.host,
                    https_compatible=True,
                )
                await stream.do_handshake()
                return stream
            except (trio.BrokenResourceError, OSError, ValueError) as error:
                # ValueError is of resolvers, for names that can be none.
                raise httpcore.ConnectError(error) from error
        raise httpcore.ConnectTimeout

    async def release(self, *, clean: bool) -> None:
        """End an exchange: become idle, or close.

        Args:
            clean: both sides have said all, and want to go on.
        """
        if clean and not self.is_closed:
            self.idle_since = trio.current_time()
        else:
            await self.aclose()
        self._released(self)

    async def aclose(self) -> None:
        """Close it, whatever it does."""
        self.is_closed = True
        stream = self._stream or self._socket
        if stream is not None:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    def is_quiet(self) -> bool:
        """Whether the server has neither closed it nor says what it should not."""
        return self._socket is not None and not self._socket.socket.is_readable()


class _Exchange:
    """One request and its answer, by h11 up to the body."""

    def __init__(self, stream: trio.abc.Stream, timeouts: Mapping[str, float | None]) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_MOST)
        self._stream = stream
        self._read_timeout = _seconds(timeouts.get("read"))
        self._write_timeout = _seconds(timeouts.get("write"))

    async def send(self, request: httpx.Request) -> None:
        """Send all of a request, unless the server stops listening."""
        assert isinstance(request.stream, AsyncIterable)
        head = h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        )
        data = self._h11.send(head) or b""
        try:
            async for piece in request.stream:
                await self._write(data + (self._h11.send(h11.Data(data=piece)) or b""))
                data = b""
            await self._write(data + (self._h11.send(h11.EndOfMessage()) or b""))
        except httpcore.WriteError:
            # It may have answered already that it does not want the rest.
            pass

    async def _write(self, data: bytes) -> None:
        with trio.move_on_after(self._write_timeout) as scope:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpcore.WriteError(error) from error
        if scope.cancelled_caught:
            raise httpcore.WriteTimeout

    async def receive_head(self) -> h11.Response:
        """The head of the final answer."""
        while not isinstance(event := await self.receive_event(), h11.Response):
            assert isinstance(event, h11.InformationalResponse)
        return event

    async def receive_event(self) -> h11.Event | type[h11.PAUSED]:
        """What h11 makes of the next bytes.

        Once some have come, the rest of what they belong to has the time of one more wait: a server that
        sends a byte now and then must not be waited for.
        """
        deadline = float("inf")
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise httpcore.RemoteProtocolError(str(error)) from error
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]  # h11's types know no `is not`
            data = await self.receive(_HEAD_READ, deadline)
            deadline = min(deadline, trio.current_time() + self._read_timeout)
            if not data and self._h11.their_state is h11.SEND_RESPONSE:
                raise httpcore.RemoteProtocolError("the server disconnected without an answer")
            self._h11.receive_data(data)

    async def receive(self, most: int, deadline: float = float("inf")) -> bytes:
        """What the socket has, without h11; nothing at the end of the connection."""
        with trio.move_on_at(min(deadline, trio.current_time() + self._read_timeout)):
            try:
                return bytes(await self._stream.receive_some(most))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpcore.ReadError(error) from error
        raise httpcore.ReadTimeout

    def beyond(self) -> bytes:
        """What was received that h11 has not looked at."""
        return self._h11.trailing_data[0]

    @property
    def reusable(self) -> bool:
        """Whether the request was sent to its end, and neither side wants to close afterwards."""
        return self._h11.our_state is h11.DONE


class _Body(httpx.AsyncByteStream):
    """A body to be read once, and closed.

    This and the next two are objects and not generators, so that nothing is left suspended.
    """

    def __init__(self, connection: Connection, exchange: _Exchange) -> None:
        self._connection: Connection | None = connection
        self._exchange = exchange

    def _is_clean(self) -> bool:
        """Whether all was received, and the connection can have another request."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Give up the rest."""
        # Another time the connection may be somebody else's.
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.release(clean=self._is_clean())


class _ParsedBody(_Body):
    """A body of which only h11 knows the end."""

    def __init__(self, connection: Connection, exchange: _Exchange) -> None:
        super().__init__(connection, exchange)
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

    def _is_clean(self) -> bool:
        return self._ended and self._exchange.reusable and not self._exchange.beyond()


class _SizedBody(_Body):
    """A body of which the head told the length."""

    def __init__(self, connection: Connection, exchange: _Exchange, length: int) -> None:
        super().__init__(connection, exchange)
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

    def _is_clean(self) -> bool:
        return not self._left and self._reusable


def _length(request: httpx.Request, head: h11.Response) -> int | None:
    """Bytes of a body of known length; for all other cases see RFC 9112, section 6.3."""
    headers = dict(head.headers)
    if request.method != "GET" or head.status_code not in (200, 206):
        return None
    if b"transfer-encoding" in headers or b"content-length" not in headers:
        return None
    # h11 has made sure that it is one, and a number.
    return int(headers[b"content-length"])


def _seconds(timeout: float | None) -> float:
    """A time limit of httpx as one of trio."""
    return float("inf") if timeout is None else timeout
