# SPDX-License-Identifier: Apache-2.0
"""Spans for OpenTelemetry: what a call of containerd's waits for, down to requests to registries.

Only if it is installed (`pip install lazysnap[otel]`) and asked for by the environment variables of
OpenTelemetry's own, `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`. Otherwise a
span is nothing. The current span is a context variable, which trio hands on to tasks and threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lazysnap import log
from lazysnap.errors import LazysnapError

_log = log.get(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_END_MILLISECONDS = 2000

Attribute = str | int | float

_make: Callable[[str, dict[str, Attribute]], AbstractContextManager[None]] | None = None
_end: Callable[[], None] | None = None


def setup() -> None:
    """Send spans of this process from now on, if that is wanted. To be called after a fork."""
    global _make, _end  # one for each process, as in OpenTelemetry
    if _make is not None or not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _log.warning("no spans are sent: pip install lazysnap[otel]", error=error)
        return
    # Resource.create lets OTEL_SERVICE_NAME go first.
    provider = TracerProvider(
        resource=Resource.create(
            {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "lazysnap"}
        ),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("lazysnap")

    @contextmanager
    def make(name: str, attributes: dict[str, Attribute]) -> Iterator[None]:
        with tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as made:
            try:
                yield
            except LazysnapError as error:
                made.set_attribute("lazysnap.reason", error.reason)
                raise

    def end() -> None:
        provider.force_flush(_END_MILLISECONDS)
        provider.shutdown()

    _make, _end = make, end


def end() -> None:
    """Send what was not sent yet; takes two seconds at the most if nobody takes it."""
    if _end is not None:
        _end()


def span(name: str, **attributes: Attribute) -> AbstractContextManager[None]:
    """A span around the body.

    Args:
        name: what is done; the same for all of a kind.
        attributes: what it is done to.
    """
    if _make is None:
        return nullcontext()
    return _make(name, {f"lazysnap.{key}": value for key, value in attributes.items()})
