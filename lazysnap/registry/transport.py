# SPDX-License-Identifier: Apache-2.0
"""One HTTP request at a time: connections, limits, counters.

`Transport.send` is the only place from which requests leave, which is where a scheduler with
budgets belongs. It follows no redirect, knows no credentials, retries nothing: it answers with an
`Answer`, or raises `Fault` when no answer came. Transports of httpx are used without its client: nobody
here wants its cookies, redirects and hooks, and preparing for them takes much of a request's CPU time.

Whatever happens, a connection is either returned clean to the pool or closed; cancellation
included. That needs care because a half-read body that comes through a proxy is a stack of suspended
asynchronous generators, see `Answer.aclose`.
"""

from __future__ import annotations

import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import httpcore
import httpx
import trio

from lazysnap import __version__
from lazysnap.errors import RegistryError
from lazysnap.http.pool import PoolTransport, UploadBody
from lazysnap.http.proxies import Proxies
from lazysnap.http.urls import Url, parse_url
from lazysnap.registry.hosts import RegistrySettings, TLSOptions
from lazysnap.registry.retry import Fault
from lazysnap.registry.statistics import HostStatistics, Statistics

_BROKEN = (httpx.TransportError, httpcore.NetworkError, httpcore.ProtocolError)
_TIMEOUT = (httpx.TimeoutException, httpcore.TimeoutException)
_UNCONNECTED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpcore.ConnectError,
    httpcore.ConnectTimeout,
)
_DRAIN_SECONDS = 1.0
_HEADERS = {
    b"accept": (b"Accept", b"*/*"),
    b"connection": (b"Connection", b"keep-alive"),
    b"user-agent": (b"User-Agent", f"lazysnap/{__version__}".encode()),
}
"""Sent unless others are given."""


@dataclass
class _Counter:
    requests: int = 0
    bytes_received: int = 0
    retries: int = 0


class _Pace:
    """Whether a body arrives fast enough: a least number of bytes in each window of time.

    Only the time counts in which somebody waits for bytes.

    Args:
        seconds: length of a window.
        rate: least bytes per second.
    """

    def __init__(self, seconds: float, rate: float) -> None:
        self._seconds = seconds
        self._needed = rate * seconds
        self._waited = 0.0
        self._received = 0

    @property
    def left(self) -> float:
        """For how many seconds the next bytes may be waited for."""
        if self._received >= self._needed:
            return float("inf")  # there is the limit of a single wait, too
        return max(self._seconds - self._waited, 0.0)

    def note(self, waited: float, received: int) -> None:
        """Bytes have come after so many seconds."""
        self._waited += waited
        self._received += received
        if self._waited >= self._seconds and self._received >= self._needed:
            self._waited, self._received = 0.0, 0


class Answer:
    """A response whose body is read by iterating; close it in every case.

    Attributes:
        status: HTTP status.
        headers: response headers, case-insensitive.
        url: where it came from.
        url_host: host and port of the server that answered.
    """

    def __init__(
        self, response: httpx.Response, method: str, url: Url, counter: _Counter, pace: _Pace
    ) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.url = url.text
        self.url_host = url.server
        self._pace = pace
        self._method = method
        self._counter = counter
        stream = response.stream
        self._stream: httpx.AsyncByteStream = stream  # type: ignore[assignment]  # async client
        self._iterator: AsyncIterator[bytes] | None = None
        self._ended = False
        self._received = 0

    @property
    def length(self) -> int | None:
        """Bytes of the body, if the head tells; an answer to HEAD has none."""
        if self._method == "HEAD":
            return 0
        value = self.headers.get("content-length", "")
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 19 else None

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        """The next piece of the body as it arrived, not decoded.

        Raises:
            Fault: the connection broke, ended early, stalled, or is too slow.
        """
        if self._ended:
            raise StopAsyncIteration
        if self._iterator is None:
            self._iterator = aiter(self._stream)
        began = trio.current_time()
        chunk: bytes | None = None
        try:
            with trio.move_on_after(self._pace.left):
                chunk = await anext(self._iterator)
            if chunk is None:
                raise httpcore.ReadTimeout
        except StopAsyncIteration:
            self._ended = True
            # The body ended as it should: this returns the connection to the pool.
            await self._stream.aclose()
            raise
        except BaseException as error:
            self._ended = True
            await self._stream.aclose()
            if isinstance(error, _TIMEOUT):
                raise Fault(f"{self.url_host} sent nothing more in time") from error
            if isinstance(error, _BROKEN):
                raise Fault(f"{self.url_host} broke the connection: {_text(error)}") from error
            raise
        self._pace.note(trio.current_time() - began, len(chunk))
        self._received += len(chunk)
        self._counter.bytes_received += len(chunk)
        return chunk

    async def read(self, limit: int, *, deadline: float = float("inf")) -> bytes:
        """All of the body.

        Args:
            limit: most bytes to hold.
            deadline: when it must have come, by trio's clock.

        Raises:
            RegistryError: it has more than `limit` bytes; no more than that are held.
            Fault: it could not be read to its end.
        """
        if (self.length or 0) > limit:
            raise RegistryError(f"{self.url_host} sends {self.length} bytes, more than {limit}")
        data = bytearray()
        with trio.move_on_at(deadline):
            async for chunk in self:
                data += chunk
                if len(data) > limit:
                    raise RegistryError(f"{self.url_host} sends more than {limit} bytes")
            return bytes(data)
        raise Fault(f"{self.url_host} sends its answer too slowly")

    async def drain(self, limit: int = 64 << 10) -> None:
        """Read what little is left, so that the connection can be used again; otherwise close it."""
        left = limit if self.length is None else self.length - self._received
        if not self._ended and left <= limit:
            with contextlib.suppress(Fault), trio.move_on_after(_DRAIN_SECONDS):
                async for chunk in self:
                    left -= len(chunk)
                    if left < 0:
                        break
        await self.aclose()

    async def aclose(self) -> None:
        """Give up the rest of the body.

        Behind proxies httpx and httpcore stack asynchronous generators, and closing the outermost leaves
        the inner ones to the garbage collector. So the body is closed under them, and then they end
        in order, as the innermost has nothing more to read. Not the socket: if the body just happens
        to be over, the pool would offer a closed one to the next request.
        """
        if self._ended:
            return
        self._ended = True
        with trio.CancelScope(shield=True):
            await self._stream.aclose()
            if self._iterator is not None:
                with contextlib.suppress(*_BROKEN, *_TIMEOUT):
                    # What h11 holds already, less than two reads, and then the end or an error.
                    async for _ in self._iterator:
                        pass

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


@dataclass
class Transport:
    """The transports of httpx, one per kind of TLS and proxy, and the counters."""

    settings: RegistrySettings
    _pools: dict[tuple[TLSOptions | None, str | None], httpx.AsyncBaseTransport] = field(
        default_factory=dict
    )
    _counters: dict[str, _Counter] = field(default_factory=dict)
    _proxies: Proxies = field(default_factory=Proxies)

    async def aclose(self) -> None:
        """Close all connections; answers that are still open break."""
        pools = list(self._pools.values())
        self._pools.clear()
        with trio.CancelScope(shield=True):
            for pool in pools:
                await pool.aclose()

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        tls: TLSOptions,
        content: bytes | None = None,
        deadline: float,
        repeated: bool = False,
    ) -> Answer:
        """Send one request and return its answer with the body unread.

        Args:
            method: of HTTP.
            url: absolute.
            headers: all of them; `Accept-Encoding: identity` is added.
            tls: for https.
            content: body to send.
            deadline: when to give up waiting for the answer's head, by trio's clock. The time in
                which `content` goes out is not counted; a write that stalls ends it.
            repeated: count it as a retry.

        Raises:
            Fault: no answer came.
            RegistryError: the URL cannot be used.
        """
        found = parse_url(url)
        host = found.server
        counter = self._counters.setdefault(host, _Counter())
        counter.requests += 1
        counter.retries += repeated
        pool = self._pool(found, tls)
        response: httpx.Response | None = None
        with trio.move_on_at(deadline) as scope:
            request = httpx.Request(
                method,
                found.parsed,
                headers=_headers(method, found.parsed, headers, content),
                stream=UploadBody(content or b"", partial(_extend, scope)),
                extensions={"timeout": self._timeouts()},
            )
            try:
                response = await pool.handle_async_request(request)
            except (*_TIMEOUT, *_BROKEN, ssl.SSLError) as error:
                raise _failure(error, host) from error
        if response is None:
            raise Fault(f"{host} did not answer in time", cut_short=True)
        pace = _Pace(self.settings.stall_seconds, self.settings.least_bytes_per_second)
        return Answer(response, method, found, counter, pace)

    def statistics(self) -> Statistics:
        """The counters now."""
        return Statistics(
            {
                host: HostStatistics(c.requests, c.bytes_received, c.retries)
                for host, c in self._counters.items()
            }
        )

    def _timeouts(self) -> dict[str, float]:
        """In seconds, as httpx hands them on."""
        settings = self.settings
        return {
            "connect": settings.connect_seconds,
            "read": settings.stall_seconds,
            "write": settings.stall_seconds,
            "pool": settings.retry_seconds,
        }

    def _pool(self, url: Url, tls: TLSOptions) -> httpx.AsyncBaseTransport:
        key = (tls if url.is_secure else None, self._proxies.find(url.text))
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = self._new_pool(*key)
        return pool

    def _new_pool(self, tls: TLSOptions | None, proxy: str | None) -> httpx.AsyncBaseTransport:
        settings = self.settings
        # Loading the system's certificates takes longer than a request to a near registry.
        context = tls.context() if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if proxy is None:
            return PoolTransport(
                context,
                max_connections=settings.max_connections,
                keep_alive_seconds=settings.keep_alive_seconds,
            )
        limits = httpx.Limits(
            max_connections=settings.max_connections,
            keepalive_expiry=settings.keep_alive_seconds,
        )
        try:
            return httpx.AsyncHTTPTransport(verify=context, proxy=proxy, limits=limits)
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            raise RegistryError(
                f"the proxy that the environment names cannot be used: {error}",
                hint="see the variables http_proxy, https_proxy and all_proxy",
            ) from None


def _failure(error: Exception, host: str) -> Fault | RegistryError:
    """Why no answer came, as an error of ours."""
    unreachable = host if isinstance(error, _UNCONNECTED) else ""
    if isinstance(error, _TIMEOUT):
        return Fault(
            f"{host} did not answer in time ({type(error).__name__})", unreachable=unreachable
        )
    if isinstance(error, ssl.SSLError):
        return Fault(f"TLS with {host} failed: {_text(error)}")
    untrusted = _cause(error, ssl.SSLCertVerificationError)
    if untrusted is not None:
        return RegistryError(
            f"{host} shows a certificate that is not trusted: {untrusted}",
            hint="install the registry's CA certificate on this machine",
            reason="untrusted-certificate",
        )
    return Fault(f"cannot talk to {host}: {_text(error)}", unreachable=unreachable)


def _extend(scope: trio.CancelScope, seconds: float) -> None:
    """Let a scope run longer."""
    scope.deadline += seconds


def _headers(
    method: str, url: httpx.URL, headers: Mapping[str, str], content: bytes | None
) -> list[tuple[bytes, bytes]]:
    """All headers of a request.

    Raises:
        RegistryError: one cannot be sent.
    """
    found = {b"host": (b"Host", url.netloc), **_HEADERS}
    if url.userinfo:
        secret = f"{url.username}:{url.password}".encode()
        found[b"authorization"] = (b"Authorization", b"Basic " + base64.b64encode(secret))
    try:
        for name, value in headers.items():
            raw = name.encode("ascii")
            found[raw.lower()] = (raw, value.encode("ascii"))
    except UnicodeError as error:
        raise RegistryError(f"cannot ask {url.host}: {error}") from error
    found[b"accept-encoding"] = (b"Accept-Encoding", b"identity")
    if content is not None or method in ("POST", "PUT", "PATCH"):
        found[b"content-length"] = (b"Content-Length", str(len(content or b"")).encode())
    return list(found.values())


def _cause(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The exception of a kind that led to `error`."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kind):
        seen = seen.__cause__ or seen.__context__
    return seen


def _text(error: BaseException) -> str:
    """What happened, from the exception that names it: httpx wraps the telling one."""
    seen: BaseException | None = error
    while seen is not None:
        if str(seen):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__
