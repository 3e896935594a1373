# SPDX-License-Identifier: Apache-2.0
"""Spans of a real daemon and its shards, received as OpenTelemetry's collector would."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.stack import stack, wait_until

SECONDS = 120


class _Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP (opentelemetry.io/docs/specs/otlp); the spans by id."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []

    def spans(self) -> dict[bytes, tuple[str, bytes, dict[str, str]]]:
        """Name, parent and attributes."""
        service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        found = {}
        for body in list(self.bodies):
            request = service.ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        attributes = {a.key: a.value.string_value for a in span.attributes}
                        found[span.span_id] = (span.name, span.parent_span_id, attributes)
        return found

    def lines(self) -> set[tuple[str, ...]]:
        """The names from each span up to its root."""
        spans = self.spans()
        lines = set()
        for each in spans:
            line = []
            while each in spans:
                name, each, _ = spans[each]
                line.append(name)
            lines.add(tuple(line))
        return lines


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, _Collector)
        self.server.bodies.append(body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Not on standard error."""


@contextmanager
def _collector() -> Iterator[_Collector]:
    with _Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_from_prepare_to_range_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with _collector() as collector:
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with stack(tmp_path, config="[shards]\ncount = 1\n[fetch]\nbackground = false\n") as it:
            reference = it.push_busybox("traced", ["estargz", "estargz", "plain"], b"x" * 300_000)
            it.pull(reference)
            it.run(reference, "cat", "/data/payload")
            wanted = {
                ("blob request", "open layer", "prepare"),
                ("blob request", "fetch"),
            }
            wait_until(lambda: wanted <= collector.lines(), SECONDS)
        spans = collector.spans().values()
        assert any(found.get("lazysnap.range", "").startswith("bytes=") for *_, found in spans)
        reasons = {found.get("lazysnap.reason") for name, _, found in spans if name == "prepare"}
        assert "already-exists" in reasons


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.containerd
def test_a_collector_that_is_down_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with stack(tmp_path, config="[shards]\ncount = 1\n") as it:
        reference = it.push_busybox("untraced", ["estargz"] * 3, b"x" * 300_000)
        it.pull(reference)
        assert it.run(reference, "cat", "/data/payload") == "x" * 300_000
        os.kill(it.lazysnap.pid, signal.SIGTERM)


@pytest.mark.parametrize("wanted", [False, True])
def test_without_the_extra_there_are_none(tmp_path: Path, wanted: bool) -> None:
    """A package in the way makes OpenTelemetry impossible to import."""
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not here')\n")
    program = (
        "from lazysnap import log, tracing\n"
        "log.setup()\n"
        "tracing.setup()\n"
        "with tracing.span('x', layer='y'): pass\n"
        "tracing.end()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    if wanted:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert ("pip install lazysnap[otel]" in done.stderr) is wanted
