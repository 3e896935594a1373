# SPDX-License-Identifier: Apache-2.0
"""Metrics of a real daemon and its shards, asked for over HTTP as Prometheus does."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from lazysnap import monitor
from lazysnap.errors import ConfigError
from lazysnap.metrics.families import READS_HUNG, READS_IN_FLIGHT
from lazysnap.registry.client import Registry
from lazysnap.shard import reporting
from lazysnap.shard.activity import activity
from tests.support.outage import registry_stopped
from tests.support.stack import Stack, stack, wait_until

SECONDS = 120
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
QUIET = "[shards]\ncount = 1\n[fetch]\nbackground = false\nlearn_profiles = false\n"


def _read(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _scrape(path: Path) -> Series:
    """By curl, so that somebody else's HTTP is spoken."""
    done = subprocess.run(
        ["curl", "-sSf", "--unix-socket", path, "http://lazysnap/metrics"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    if shutil.which("promtool"):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=done.stdout, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    return _read(done.stdout.decode())


def _scrape_all(path: Path) -> Series:
    """With numbers of the (only) worker, which on a busy machine may not answer within its second."""
    found: list[Series] = []

    def answered() -> bool:
        found.append(_scrape(path))
        return _value(found[-1], "lazysnap_shards", state="up") == 1

    wait_until(answered, SECONDS)
    return found[-1]


def _value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def _growing(series: Series) -> Series:
    """What may never go back."""
    ends = ("_total", "_count", "_sum", "_bucket")
    return {key: value for key, value in series.items() if key[0].endswith(ends)}


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_what_a_start_costs_is_counted_and_nothing_goes_back(tmp_path: Path) -> None:
    address = tmp_path / "m.sock"
    with stack(tmp_path, config=f'metrics_address = "unix:{address}"\n{QUIET}') as it:
        before = _scrape_all(address)
        assert _value(before, "lazysnap_mount_seconds_count") == 0
        assert _value(before, "lazysnap_fetch_bytes_total", **{"class": "demand"}) == 0
        reference = it.push_busybox(
            "counted", ["estargz", "estargz", "plain"], payload=os.urandom(400_000).hex().encode()
        )
        it.pull(reference)
        it.run(reference, "cat", "/data/payload")
        after = _scrape_all(address)
        assert _value(after, "lazysnap_lazy_layers") == 2
        assert _value(after, "lazysnap_mount_seconds_count") == 2
        assert _value(after, "lazysnap_fallbacks_total", reason="no-toc-digest") == 1
        assert _value(after, "lazysnap_grpc_request_seconds_count", method="prepare") >= 3
        lazy = {"method": "prepare", "code": "ALREADY_EXISTS"}
        assert _value(after, "lazysnap_grpc_errors_total", **lazy) == 2
        wait_until(lambda: _agrees(it, _scrape_all(address)), SECONDS)
        _survives_a_worker(it, address, after)


def _agrees(it: Stack, series: Series) -> bool:
    """Whether metrics and status tell the same; not while something is being fetched ahead."""
    fetched = sum(
        _value(series, "lazysnap_fetch_bytes_total", **{"class": each})
        for each in ("demand", "prefetch", "background")
    )
    assert 0 < fetched <= _value(series, "lazysnap_registry_received_bytes_total")
    missed = _value(series, "lazysnap_reads_missed_total")
    reads = _value(series, "lazysnap_fuse_request_seconds_count", operation="read")
    assert missed > 0
    layers = [
        layer for shard in it.lazysnap.shards() for layer in it.lazysnap.call(shard, "status")
    ]
    by_class = [sum(layer["fetched_by_class"].values()) for layer in layers]
    assert by_class == [layer["fetched_bytes"] for layer in layers]
    assert any(layer["last_read_seconds_ago"] is not None for layer in layers)
    return sum(layer["fetched_bytes"] for layer in layers) == fetched and missed <= reads


def _survives_a_worker(it: Stack, address: Path, before: Series) -> None:
    (shard, worker), *_ = it.lazysnap.workers().items()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: it.lazysnap.workers()[shard] != worker)
    # The daemon looks after its shards every few seconds.
    restarts = "lazysnap_shard_restarts_total"
    wait_until(lambda: _value(_scrape(address), restarts, cause="died") >= 1)
    after = _scrape_all(address)
    fallen = {key for key, value in _growing(before).items() if after.get(key, -1) < value}
    assert fallen == set()


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_a_shard_that_hangs_does_not_hang_a_scrape(tmp_path: Path) -> None:
    address = tmp_path / "m.sock"
    with stack(tmp_path, config=f'metrics_address = "unix:{address}"\n{QUIET}') as it:
        before = _scrape_all(address)
        (worker,) = it.lazysnap.workers().values()
        os.kill(worker, signal.SIGSTOP)
        try:
            stopped = _scrape(address)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert _value(stopped, "lazysnap_shards", state="down") == 1
        fallen = {key for key, value in _growing(before).items() if stopped.get(key, -1) < value}
        assert fallen == set()
        wait_until(lambda: _value(_scrape(address), "lazysnap_shards", state="up") == 1)
        it.lazysnap.stop()
        assert not address.exists()
        it.lazysnap.kill_shards()


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_a_read_that_waits_is_seen(tmp_path: Path) -> None:
    address = tmp_path / "m.sock"
    config = f'metrics_address = "unix:{address}"\n{QUIET}[registry]\nretry_seconds = 600\n'
    with stack(tmp_path, config=f"{config}stall_seconds = 600\n") as it:
        payload = os.urandom(200_000).hex().encode()
        reference = it.push_busybox("waits", ["estargz"] * 3, payload=payload)
        it.pull(reference)
        (path,) = it.lazysnap.root.glob("shards/*/*/data/payload")
        with registry_stopped(it):
            assert _value(_scrape_all(address), "lazysnap_reads_in_flight") == 0
            reader = subprocess.Popen(["sha256sum", path], stdout=subprocess.PIPE)
            wait_until(lambda: _value(_scrape(address), "lazysnap_reads_in_flight") > 0, SECONDS)
            assert _value(_scrape_all(address), "lazysnap_reads_hung") == 0
        output, _ = reader.communicate(timeout=SECONDS)
        assert output.split()[0].decode() == hashlib.sha256(payload).hexdigest()
        wait_until(lambda: _value(_scrape(address), "lazysnap_reads_in_flight") == 0, SECONDS)


async def test_a_read_hangs_after_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    waiting = {object(): now - 1, object(): now - 29, object(): now - 31}
    monkeypatch.setattr(activity, "waiting", waiting)
    async with Registry() as registry:
        gauges = reporting.metrics(registry, now).gauges
    assert (gauges[READS_IN_FLIGHT], gauges[READS_HUNG]) == (3, 1)


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_a_daemon_counts_from_its_own_start(tmp_path: Path) -> None:
    """What shards did before would look like a jump in a rate."""
    address = tmp_path / "m.sock"
    with stack(tmp_path, config=f'metrics_address = "unix:{address}"\n{QUIET}') as it:
        reference = it.push_busybox(
            "again", ["estargz"] * 3, payload=os.urandom(200_000).hex().encode()
        )
        it.pull(reference)
        it.run(reference, "cat", "/data/payload")
        demand = {"class": "demand"}
        assert _value(_scrape_all(address), "lazysnap_fetch_bytes_total", **demand) > 0
        it.lazysnap.stop()
        it.lazysnap.start()
        series = _scrape_all(address)
        assert _value(series, "lazysnap_fetch_bytes_total", **demand) == 0
        assert _value(series, "lazysnap_restored_layers_total", result="ok") == 3
        assert _value(series, "lazysnap_restored_layers_total", result="failed") == 0


async def _text() -> bytes:
    return b"a 1\n"


async def test_http_over_tcp() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen"):
            reserved.listen()
            await monitor.serve(f"127.0.0.1:{port}", _text)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(monitor.serve, "127.0.0.1:0", _text)
        port = listeners[0].socket.getsockname()[1]

        def talk() -> list[tuple[int, bytes]]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            answers = []
            for method, path in (
                *(("GET", "/metrics"), ("HEAD", "/metrics"), ("GET", "/metrics?name[]=a")),
                *(("GET", "/"), ("POST", "/metrics")),
            ):
                connection.request(method, path, body=b"x" if method == "POST" else None)
                response = connection.getresponse()
                answers.append((response.status, response.read()))
            connection.close()
            return answers

        assert await trio.to_thread.run_sync(talk) == [
            (200, b"a 1\n"),
            (200, b""),
            (200, b"a 1\n"),
            (404, b"there is only /metrics\n"),
            (405, b"only GET\n"),
        ]
        nursery.cancel_scope.cancel()


async def test_http_over_a_unix_socket_by_httpx_and_bad_clients(tmp_path: Path) -> None:
    path = tmp_path / "d" / "m.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.serve, f"unix:{path}", _text)
        assert path.stat().st_mode & 0o777 == 0o600
        for rubbish in (b"\x00\xff\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x" * 100_000, b""):
            stream = await trio.open_unix_socket(str(path))
            async with stream:
                try:
                    await stream.send_all(rubbish)
                    await stream.send_eof()
                    while await stream.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport) as client:
            answer = await client.get("http://lazysnap/metrics")
        assert (answer.status_code, answer.text) == (200, "a 1\n")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        with pytest.raises(ConfigError, match="already serves"):
            await monitor.serve(f"unix:{path}", _text)
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_failing_scrape_does_not_end_the_server(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"

    async def broken() -> bytes:
        raise ValueError("a defect")

    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.serve, f"unix:{path}", broken)
        for _ in range(2):
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport) as client:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get("http://lazysnap/metrics")
        nursery.cancel_scope.cancel()
