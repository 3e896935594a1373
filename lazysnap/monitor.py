# SPDX-License-Identifier: Apache-2.0
"""Answers Prometheus: asks all shards what they have counted, adds it up, and serves it over HTTP.

A shard that does not answer in time counts with what it said last, so a scrape takes little more than a
second whatever is stuck, and no counter goes back.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import h11
import trio

import lazysnap
from lazysnap import channel, log
from lazysnap.errors import ConfigError
from lazysnap.metrics import families
from lazysnap.metrics.counts import counts
from lazysnap.metrics.exposition import CONTENT_TYPE, render
from lazysnap.metrics.totals import Totals, added
from lazysnap.registry.client import Registry
from lazysnap.shard.reporting import registry_sample
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
_SHARD_SECONDS = 1.0
# A client that sends nothing, or reads nothing, is hung up on.
_IDLE_SECONDS = 120.0
_MOST_HEAD = 16 << 10
_MOST_CLIENTS = 32


class Monitor:
    """The numbers of a daemon and its shards.

    Args:
        supervisor: of the shards.
        registry: the daemon's own client.
        layers: tells how many layers are mounted lazily.
    """

    def __init__(
        self, supervisor: Supervisor, registry: Registry, layers: Callable[[], int]
    ) -> None:
        self._supervisor = supervisor
        self._registry = registry
        self._layers = layers
        self._totals = Totals()
        self._started = time.monotonic()
        self._asking = trio.Lock()  # answers must be noted in the order in which they were given

    async def begin(self) -> None:
        """Count from now on what older workers do."""
        async with self._asking:
            await self._ask()

    async def text(self) -> bytes:
        """Everything, in the text format of Prometheus."""
        async with self._asking:
            gauges = await self._ask()
            sample = added(self._totals.sum(), counts.sample())
            return render(added(sample, registry_sample(self._registry)), gauges)

    async def _ask(self) -> Mapping[str, Mapping[str, float]]:
        answers = await self._supervisor.ask_all(
            lambda each: each.metrics(), timeout=_SHARD_SECONDS
        )
        gauges: dict[str, dict[str, float]] = {
            families.INFO: {lazysnap.__version__: 1},
            families.LAZY_LAYERS: {"": self._layers()},
            families.SHARDS: {"up": 0, "down": 0},
        }
        for shard, answer in answers.items():
            gauges[families.SHARDS]["down" if answer is None else "up"] += 1
            if answer is None:
                continue
            young = answer.started >= self._started
            self._totals.note(shard, answer.process, answer.sample, whole=young)
            for name, number in answer.gauges.items():
                of = gauges.setdefault(name, {"": 0})
                of[""] += number
        return gauges


async def start(
    nursery: trio.Nursery, supervisor: Supervisor, registry: Registry, address: str
) -> None:
    """Begin to count, and to answer `GET /metrics` if there is an address.

    Args:
        nursery: where requests are answered.
        supervisor: of the shards.
        registry: the daemon's client.
        address: as for `serve`; empty if metrics are not served.

    Raises:
        ConfigError: the address cannot be used.
    """
    monitor = Monitor(supervisor, registry, supervisor.layers)
    await monitor.begin()
    if address:
        await nursery.start(serve, address, monitor.text)


async def serve(
    address: str,
    text: Callable[[], Awaitable[bytes]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer `GET /metrics` until cancelled.

    Args:
        address: `unix:` and a path, or host and port with a colon between them.
        text: makes the answer.
        task_status: told when clients can connect.

    Raises:
        ConfigError: the address cannot be used.
    """
    path = address.removeprefix("unix:") if address.startswith("unix:") else ""
    listeners = [_unix(path)] if path else await _tcp(address)
    clients = trio.CapacityLimiter(_MOST_CLIENTS)

    async def client(stream: trio.SocketStream) -> None:
        try:
            clients.acquire_nowait()
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            async with stream:
                with trio.move_on_after(_IDLE_SECONDS) as patience:
                    await _converse(stream, text, patience)
        except (*channel.BROKEN, h11.RemoteProtocolError) as error:
            _log.debug("scrape broken off", error=error)
        except Exception:  # an edge: a bad scrape must not end the daemon
            _log.exception("scrape failed")
        finally:
            clients.release()

    try:
        _log.info("serving metrics", address=address)
        await trio.serve_listeners(client, listeners, task_status=task_status)  # type: ignore[arg-type]
    finally:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _unix(path: str) -> trio.SocketListener:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1)
        probe.connect(path)
        raise ConfigError(
            f"something already serves at {path}", hint="choose another metrics_address"
        )
    try:
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"metrics_address: {path} cannot be made: {error.strerror}") from error
    return channel.listen(path)


async def _tcp(address: str) -> list[trio.SocketListener]:
    host, _, port = address.rpartition(":")
    try:
        return await trio.open_tcp_listeners(int(port), host=host.strip("[]"))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"metrics_address: cannot listen on {address}: {error}",
            hint="is the port in use? choose another one",
        ) from error


async def _converse(
    stream: trio.SocketStream, text: Callable[[], Awaitable[bytes]], patience: trio.CancelScope
) -> None:
    """Answer the requests of one connection until its end."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_MOST_HEAD))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            await stream.send_all(await _answer(connection, request, text))
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()
            patience.deadline = trio.current_time() + _IDLE_SECONDS
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return


async def _answer(
    connection: h11.Connection, request: h11.Request, text: Callable[[], Awaitable[bytes]]
) -> bytes:
    """The bytes that answer a request."""
    status, kind, body = 200, CONTENT_TYPE, b""
    headers: list[tuple[str, str]] = []
    if request.method not in (b"GET", b"HEAD"):
        status, kind, body = 405, "text/plain", b"only GET\n"
        headers = [("Allow", "GET, HEAD")]
    elif request.target.partition(b"?")[0] != b"/metrics":
        status, kind, body = 404, "text/plain", b"there is only /metrics\n"
    else:
        body = await text()
    headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
    data: Any = connection.send(h11.Response(status_code=status, headers=headers))
    if request.method != b"HEAD":
        data += connection.send(h11.Data(data=body))
    return bytes(data + (connection.send(h11.EndOfMessage()) or b""))
