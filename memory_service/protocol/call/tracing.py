"""Traces of both services (OpenTelemetry), which nothing imports unless an endpoint for them is configured.

No span names a user: paths appear as templates, queries and bodies not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from memory_service.protocol.call.context import CALL, Call
from model.errors import RamrecError

NO_NATIVE_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
"""For `FastAPI(telemetry=…)`: what newer versions export by themselves contains whole paths, and so user ids."""


class TracingError(RamrecError):
    """A trace endpoint is configured, but OpenTelemetry is not installed."""


def tracer_of(service: str) -> Any:
    """The tracer that sends the spans of a service to OTEL_EXPORTER_OTLP_ENDPOINT; None where that is not set.

    Raises:
        TracingError: the extra `otel` is not installed.
    """
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: pip install 'ramrec[otel]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("ramrec")


def begin_request(call: Call, tracer: Any, method: str) -> None:
    """Open the span of a request, in the caller's trace if it sent one."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract({"traceparent": call.traceparent} if call.traceparent else {})
    call.tracer = tracer
    call.span = tracer.start_span(method, context=parent, kind=SpanKind.SERVER)


def end_request(call: Call, method: str, route: str, status: int) -> None:
    """End the span of a request."""
    from opentelemetry.trace import StatusCode

    call.span.update_name(f"{method} {route}")
    call.span.set_attributes(
        {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "ramrec.request_id": call.request_id,
        }
    )
    if status >= 500:
        call.span.set_status(StatusCode.ERROR)
    call.span.end()


@contextmanager
def span(name: str, *, remote: bool = False) -> Iterator[None]:
    """Record a part of the current call as its own span, where traces are on; `remote`: another service does it."""
    call = CALL.get()
    if call is None or call.span is None:
        yield
        return
    from opentelemetry.trace import Link, SpanKind, StatusCode, set_span_in_context

    part = call.tracer.start_span(
        name,
        context=set_span_in_context(call.span),
        kind=SpanKind.CLIENT if remote else SpanKind.INTERNAL,
        links=[Link(other.get_span_context()) for other in call.linked],
    )
    token = CALL.set(replace(call, span=part, linked=()))
    try:
        yield
    except Exception as error:  # the text of an error may name a user, its type does not
        part.set_status(StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        CALL.reset(token)
        part.end()
